"""A complete graph scores and judges an image of any size as `Predictor` does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import resize_image
from almrr_pipeline.common.region import draw_region
from almrr_pipeline.config import Tiling
from almrr_pipeline.inference.complete_graph import complete_graph
from almrr_pipeline.inference.export import export_openvino
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.map_predictor import MapPredictor
from almrr_pipeline.inference.predictor import Predictor, image_score
from almrr_pipeline.model.almrr import ALMRR

MAP_TOLERANCE, SCORE_TOLERANCE = 5e-3, 1e-3


def test_openvino_predicts_images_of_any_size(model_folder: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    predictor = Predictor(model_folder)
    path = tmp_path / "complete.xml"
    export_openvino(ALMRR.load(model_folder), path, complete=predictor.config)
    run = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    images = [resize_image(noise, size) for size in ((128, 128), (301, 233), (60, 97))]
    for image, expected in zip(images, predictor(images), strict=True):
        given = run(image)
        assert given["map"].shape == image.shape[:2]
        np.testing.assert_allclose(given["map"], expected.anomaly_map, rtol=0, atol=MAP_TOLERANCE)
        assert float(given["score"]) == pytest.approx(expected.score, abs=SCORE_TOLERANCE)
        if abs(expected.score - predictor.image_threshold) > SCORE_TOLERANCE:
            assert bool(given["is_anomalous"]) == expected.is_anomalous


class _MeanOfChannels(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=1)


def test_the_region_is_part_of_the_graph() -> None:
    """With a network that is quickly exported."""
    onnx, openvino = pytest.importorskip("onnx"), pytest.importorskip("openvino")
    runtime = pytest.importorskip("onnxruntime")
    region = draw_region([[(0.3, 0.1), (0.9, 0.5), (0.2, 0.8)]], (301, 233))
    graph = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20]>
        mean (float[n, 3, 128, 128] images) => (float[n, 128, 128] anomaly_map) {
            axis = Constant <value_ints = [1]> ()
            anomaly_map = ReduceMean <keepdims=0> (images, axis)
        }"""
    )
    config = InferenceConfig(category="x", image_size=(128, 128), region=region)
    complete_graph(graph, config)
    onnx.checker.check_model(graph, full_check=True)
    session = runtime.InferenceSession(graph.SerializeToString())
    core = openvino.Core()
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(graph.SerializeToString()), "CPU", precision)
    network, cpu = _MeanOfChannels().eval(), torch.device("cpu")
    predictor = MapPredictor(network, (128, 128), Tiling(), 2, cpu, region=region)
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    images = [resize_image(noise, size) for size in ((128, 128), (301, 233), (60, 97))]
    for image, scaled in zip(images, predictor.maps(images), strict=True):
        expected, score = scaled.at_image_size(), image_score(scaled.anomaly_map, config.smoothing)
        assert 0.2 < (expected > 0).mean() < 0.3
        first, given = session.run(None, {"image": image}), compiled(image)
        for found, value in ((first[0], first[1]), (given["map"], given["score"])):
            np.testing.assert_allclose(found, expected, rtol=0, atol=MAP_TOLERANCE)
            assert float(value) == pytest.approx(score, abs=SCORE_TOLERANCE)
            assert not found[~region.at(image.shape[:2])].any()


def test_a_model_of_tiles_is_refused(tiling_model_folder: Path, tmp_path: Path) -> None:
    model, config = ALMRR.load(tiling_model_folder), InferenceConfig.load(tiling_model_folder)
    with pytest.raises(AlmrrError, match="cannot cut images into tiles"):
        export_openvino(model, tmp_path / "complete.xml", complete=config)
    assert list(tmp_path.iterdir()) == []
