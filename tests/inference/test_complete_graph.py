"""A complete graph scores and judges an image of any size as `Predictor` does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import resize_image
from almrr_pipeline.inference.export import export_openvino
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.predictor import Predictor
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


def test_a_model_of_tiles_is_refused(tiling_model_folder: Path, tmp_path: Path) -> None:
    model, config = ALMRR.load(tiling_model_folder), InferenceConfig.load(tiling_model_folder)
    with pytest.raises(AlmrrError, match="cannot cut images into tiles"):
        export_openvino(model, tmp_path / "complete.xml", complete=config)
    assert list(tmp_path.iterdir()) == []
