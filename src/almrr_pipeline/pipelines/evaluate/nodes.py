"""Steps of the evaluate pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from almrr_pipeline.common.arrays import AnomalyMap
from almrr_pipeline.common.images import read_image
from almrr_pipeline.config import EvaluateSettings, InferenceSettings, ReportSettings
from almrr_pipeline.evaluation.evaluate import evaluate as evaluate_maps
from almrr_pipeline.evaluation.maps import AnomalyMaps, GroundTruth, tabulate_scores
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.predictor import Predictor, image_score
from almrr_pipeline.reporting.examples import Result, draw_examples, pack_examples


def predict_maps(
    model: Path, manifest: pd.DataFrame, data_folder: Path, inference: InferenceSettings
) -> Iterator[dict[str, AnomalyMap]]:
    """Predict the anomaly map of every test image, at the size that the metrics are taken at.

    Yields:
        Maps by their place in the manifest, a batch at a time: Kedro saves each batch before it asks for the next.
    """
    predictor = Predictor(
        model, batch_size=inference.batch_size, scan_backend=inference.scan_backend
    )
    images = [data_folder / name for name in _test_rows(manifest)["image"]]
    maps = enumerate(predictor.map_predictor.maps(images, at="network"))
    while batch := {f"{index:06d}": one for index, one in islice(maps, inference.batch_size)}:
        yield batch


def score_images(
    maps: AnomalyMaps, manifest: pd.DataFrame, model: Path, data_folder: Path
) -> pd.DataFrame:
    """Score every test image, and compare the scores with the model's own threshold."""
    config = InferenceConfig.load(model)
    rows = _test_rows(manifest)
    return tabulate_scores(
        rows,
        maps,
        _ground_truth(rows, maps, data_folder),
        scores=[image_score(anomaly_map, config.smoothing) for anomaly_map in maps],
        threshold=config.thresholds.image.value if config.thresholds else None,
    )


def compute_metrics(
    maps: AnomalyMaps,
    scores: pd.DataFrame,
    manifest: pd.DataFrame,
    model: Path,
    data_folder: Path,
    evaluate: EvaluateSettings,
    seed: int,
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Compute all metrics, and the curves of pixels and images by name."""
    thresholds = InferenceConfig.load(model).thresholds
    evaluation = evaluate_maps(
        maps,
        _ground_truth(_test_rows(manifest), maps, data_folder),
        scores["score"],
        scores["label"] == "defective",
        list(scores["defect_type"]),
        evaluate,
        image_threshold=thresholds.image if thresholds else None,
        pixel_threshold=thresholds.pixel if thresholds else None,
        seed=seed,
    )
    return evaluation.metrics, dict(evaluation.curves)


def draw_overlays(
    maps: AnomalyMaps,
    scores: pd.DataFrame,
    manifest: pd.DataFrame,
    model: Path,
    data_folder: Path,
    report: ReportSettings,
) -> dict[str, bytes]:
    """Draw the best, the typical and the worst results; files by name, with an index of their captions."""
    thresholds = InferenceConfig.load(model).thresholds
    rows = _test_rows(manifest)
    truth = _ground_truth(rows, maps, data_folder)
    places = {image: index for index, image in enumerate(rows["image"])}

    def load(image: str) -> Result:
        return read_image(data_folder / image), truth[places[image]], maps[places[image]]

    threshold = thresholds.pixel.value if thresholds else None
    return pack_examples(
        draw_examples(scores, count=report.examples, load=load, threshold=threshold)
    )


def _test_rows(manifest: pd.DataFrame) -> pd.DataFrame:
    return manifest[manifest["split"] == "test"].reset_index(drop=True)


def _ground_truth(rows: pd.DataFrame, maps: AnomalyMaps, data_folder: Path) -> GroundTruth:
    return GroundTruth([data_folder / name if name else None for name in rows["mask"]], maps)
