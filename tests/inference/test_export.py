"""Exported files give the maps of the model they were made from, without this package."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import BackboneSettings, ModelSettings
from almrr_pipeline.inference import export
from almrr_pipeline.inference.export import export_onnx, export_openvino, export_torch
from almrr_pipeline.inference.fuse import fuse
from almrr_pipeline.inference.runtimes import ExportedNetwork
from almrr_pipeline.inference.tta import FlipAveraged
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone

pytestmark = pytest.mark.xdist_group("export")  # one graph of each kind, made once

SIZE = (128, 256)


@pytest.fixture(scope="module")
def model() -> ALMRR:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build_backbone(BackboneSettings(name="test_efficientnet"), weights=None)
        sizes = ModelSettings(
            latent=16,
            dim=16,
            depth=1,
            state=4,
            decoder=(8, 12),
            refinement_width=4,
            residual_channels=2,
            fine_channels=2,
            memory_size=5,
            memory_exponent=2.0,
            posterior_gamma=2.0,
        )
        model = ALMRR(backbone, sizes, image_size=SIZE).eval()
        model.fill_memory([(draw_images(2), torch.arange(2))], images=2, seed=0)
        with torch.no_grad():
            model.frm.out.weight *= 100.0
    return model


@pytest.fixture(scope="module")
def onnx_file(model: ALMRR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(model, path)
    return path


@pytest.fixture(scope="module")
def flips_onnx_file(model: ALMRR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flips") / "model.onnx"
    export_onnx(model, path, flips=True)
    return path


def map_with_torch(model: ALMRR, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(images).numpy()


def draw_images(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    blots = torch.rand(batch, 3, 5, 9, generator=generator)
    return torch.nn.functional.interpolate(blots, size=SIZE, mode="bilinear")


@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_gives_the_models_maps(model: ALMRR, onnx_file: Path, batch: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    images = draw_images(batch)
    (given,) = session.run(["anomaly_map"], {"images": images.numpy()})
    expected = map_with_torch(model, images)
    assert given.shape == (batch, *SIZE)
    assert expected.std() > 0.01
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)


def test_the_graph_takes_any_batch_and_one_size(onnx_file: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(onnx_file).graph
    (images,) = graph.input
    batch, *rest = images.type.tensor_type.shape.dim
    assert batch.dim_param == "batch"
    assert [axis.dim_value for axis in rest] == [3, *SIZE]


def test_the_scan_does_not_unroll(model: ALMRR, onnx_file: Path) -> None:
    """128 tokens scanned step by step in two directions would take more nodes than allowed here."""
    onnx = pytest.importorskip("onnx")
    nodes = len(onnx.load(onnx_file, load_external_data=False).graph.node)
    assert model.mfrm.position.shape[1] == 128
    assert nodes < 2 * 2 * 128


def test_weights_are_inside_the_one_file(onnx_file: Path) -> None:
    assert [path.name for path in onnx_file.parent.iterdir()] == ["model.onnx"]


def test_torch_export_gives_the_models_maps(model: ALMRR, tmp_path: Path) -> None:
    export_torch(fuse(model), tmp_path / "model.pt2")  # fused before or not: both are taken
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 3):
        images = draw_images(batch)
        given = program(images).detach().numpy()
        np.testing.assert_allclose(given, map_with_torch(model, images), rtol=0, atol=1e-4)


def test_openvino_gives_the_models_maps(
    model: ALMRR, flips_onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from its own format, with flips, by the network that `--runtime openvino` takes."""
    pytest.importorskip("openvino")

    def take_exported(given: ALMRR, path: Path, *, flips: bool, complete: None) -> None:
        assert given is model
        assert flips
        assert complete is None
        shutil.copy(flips_onnx_file, path)  # an export takes half a minute

    monkeypatch.setattr(export, "export_onnx", take_exported)
    export_openvino(model, tmp_path / "model.xml", flips=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    network = ExportedNetwork(tmp_path / "model.xml", "openvino")
    for batch in (1, 3):
        images = draw_images(batch)
        expected = map_with_torch(FlipAveraged(model), images)
        np.testing.assert_allclose(network(images).numpy(), expected, rtol=0, atol=1e-4)


def test_openvino_reads_the_onnx_file_too(model: ALMRR, onnx_file: Path) -> None:
    pytest.importorskip("openvino")
    images = draw_images(3)
    given = ExportedNetwork(onnx_file, "openvino")(images).numpy()
    np.testing.assert_allclose(given, map_with_torch(model, images), rtol=0, atol=1e-4)


def test_onnx_takes_the_mean_over_flips(model: ALMRR, flips_onnx_file: Path) -> None:
    """torch.export's: with the command that follows a model's settings."""
    onnxruntime = pytest.importorskip("onnxruntime")
    images = draw_images(3)
    expected = map_with_torch(FlipAveraged(model), images)
    assert np.abs(expected - map_with_torch(model, images)).max() > 0.01
    session = onnxruntime.InferenceSession(flips_onnx_file, providers=["CPUExecutionProvider"])
    (given,) = session.run(["anomaly_map"], {"images": images.numpy()})
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("write", [export_onnx, export_torch])
def test_a_place_without_a_file_is_refused_at_once(
    model: ALMRR, tmp_path: Path, write: Callable[[ALMRR, Path], None]
) -> None:
    with pytest.raises(AlmrrError, match="no folder"):
        write(model, tmp_path / "absent" / "model")
    with pytest.raises(AlmrrError, match="is a folder"):
        write(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
