"""Fixtures that every test may ask for."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.config import BackboneSettings, ModelSettings, Tiling

if TYPE_CHECKING:
    from almrr_pipeline.model.almrr import ALMRR

PROJECT = Path(__file__).resolve().parents[1]
sys.path.append(str(PROJECT / "tests"))  # for project_copy
SIZE = (128, 160)
SMALL: dict[str, Any] = {
    "latent": 24,
    "dim": 16,
    "depth": 2,
    "state": 4,
    "decoder": (8, 12),
    "refinement_width": 4,
}


@pytest.fixture(scope="session")
def project() -> Path:
    """The project's root folder."""
    return PROJECT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real data sets and weights; the test is skipped where it is absent."""
    folder = Path(os.environ.get("ALMRR_SHARED", PROJECT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"the real data sets are not here: no {folder / 'data'} (set ALMRR_SHARED)")
    return folder


@pytest.fixture
def set_torch_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`; after the test the number is again what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def noise() -> list[ImageArray]:
    """Seven images of noise, smaller and larger than the small networks' tiles."""
    generator = np.random.default_rng(0)
    sizes = [(20, 30), (150, 40), (64, 96), (33, 131), (128, 128), (31, 49), (90, 90)]
    return [generator.integers(0, 256, size=(*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture(scope="session")
def noise_paths(noise: list[ImageArray], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same as files."""
    return _write(noise, tmp_path_factory.mktemp("noise"))


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[[list[ImageArray]], list[Path]]:
    """Writes images as 00.png, 01.png, ... and gives their paths."""
    return lambda images: _write(images, tmp_path)


def _write(images: list[ImageArray], folder: Path) -> list[Path]:
    paths = [folder / f"{position:02d}.png" for position in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def save_model(
    folder: Path,
    *,
    tiling: Tiling | None = None,
    flips: bool = False,
    calibrated: bool = True,
) -> Path:
    """A complete model folder with random weights, and thresholds as if from 19 normal images."""
    # Not at the top: most tests need no model.
    from almrr_pipeline.evaluation.thresholds import conformal_threshold
    from almrr_pipeline.inference.inference_config import InferenceConfig, Thresholds
    from almrr_pipeline.model.almrr import ALMRR
    from almrr_pipeline.model.backbone import build_backbone

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = ALMRR(
        build_backbone(BackboneSettings(name="test_resnet"), weights=None),
        ModelSettings(latent=16, dim=16, depth=1, state=4, decoder=(16, 16), refinement_width=4),
        image_size=(128, 128),
        scan_backend="torch",
    )
    model.save(folder)
    threshold = conformal_threshold(np.linspace(0.1, 0.5, 19), 0.05)
    InferenceConfig(
        category="sample_brick",
        image_size=(128, 128),
        tiling=tiling or Tiling(),
        smoothing=9,
        flips=flips,
        thresholds=Thresholds(image=threshold, pixel=threshold) if calibrated else None,
    ).save(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated model that resizes whole images."""
    return save_model(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="session")
def tiling_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated model that works on tiles."""
    tiling = Tiling(enabled=True, overlap=0.25)
    return save_model(tmp_path_factory.mktemp("models") / "tiling", tiling=tiling)


@pytest.fixture(scope="session")
def flips_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated model whose maps are means over flips."""
    return save_model(tmp_path_factory.mktemp("models") / "flips", flips=True)


@pytest.fixture(scope="session")
def uncalibrated_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without thresholds."""
    return save_model(tmp_path_factory.mktemp("models") / "uncalibrated", calibrated=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def build_model() -> Callable[..., ALMRR]:
    """Builds a small model in evaluation mode whose maps vary; keywords replace small values."""
    from almrr_pipeline.model.almrr import ALMRR  # not at the top: most tests need no model
    from almrr_pipeline.model.backbone import build_backbone

    built: dict[str, ALMRR] = {}

    def build(
        backbone: str = "test_resnet", feature_location: str = "bottleneck", **changes: Any
    ) -> ALMRR:
        key = repr((backbone, feature_location, sorted(changes.items())))
        if key not in built:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                options = BackboneSettings(name=backbone, feature_location=feature_location)  # type: ignore[arg-type]
                network = build_backbone(options, weights=None)
                size = changes.pop("image_size", SIZE)
                settings = ModelSettings(**(SMALL | changes))
                built[key] = ALMRR(network, settings, image_size=size, scan_backend="torch")
                make_lively(built[key])
        return copy.deepcopy(built[key])

    return build


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Two images of the small size with coarse and fine structure, (2, 3, 128, 160)."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return draw_images(2, (128, 160))


def draw_images(count: int, size: tuple[int, int]) -> Tensor:
    """Coarse blots of color with a little noise."""
    blots = F.interpolate(torch.rand(count, 3, 6, 7), size=size, mode="bicubic")
    return (blots + 0.2 * torch.rand(count, 3, *size) - 0.1).clamp(0.0, 1.0)


@torch.no_grad()
def make_lively(model: ALMRR) -> None:
    """Give a model what training would: fitting statistics, no zero weights, maps from 0 to 1."""
    images = draw_images(4, model.image_size)
    norms = [module for module in model.frm.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = 1.0
    if model.settings.standardize:
        model.fit_standardization([images])
    if model.memory is not None:
        model.fill_memory([(images, torch.arange(len(images)))], images=len(images), seed=0)
    model.train().training_forward(images, images)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()
    features = model.embed(images)
    distances = None if model.memory is None else model.memory(features)
    logits = model.refine(model.reconstruct(features), features, images, distances)
    difference = logits[:, 1] - logits[:, 0]
    model.frm.out.weight /= difference.std()
    model.frm.out.bias /= difference.std()
    model.frm.out.bias[0] += difference.mean() / difference.std()
