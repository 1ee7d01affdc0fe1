"""A small network with known answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest
from torch import Tensor, nn

from almrr_pipeline.inference.export import export_onnx
from almrr_pipeline.model.almrr import ALMRR


class Brightness(nn.Module):
    """The map is the image's first channel: what goes in comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return images[:, 0]


@pytest.fixture
def brightness() -> Brightness:
    return Brightness().eval()


@pytest.fixture(scope="session")
def onnx_file_of_model_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export takes half a minute: what several tests need is made once."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(ALMRR.load(model_folder), path)
    return path


@pytest.fixture
def copy_onnx(onnx_file_of_model_folder: Path) -> mock.Mock:
    """Stands for `export_onnx`, of the model folder alone and without flips."""

    def copy(model: ALMRR, path: Path, *, flips: bool = False, complete: object = None) -> None:
        assert not flips
        assert complete is None
        shutil.copy(onnx_file_of_model_folder, path)

    stand_in: mock.Mock = mock.create_autospec(export_onnx, side_effect=copy)
    return stand_in
