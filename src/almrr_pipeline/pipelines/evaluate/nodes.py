"""Steps of the evaluate pipeline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from almrr_pipeline.config import EvaluateSettings, ReportSettings, ScanSettings
from almrr_pipeline.evaluation.maps import AnomalyMaps, GroundTruth, tabulate_scores
from almrr_pipeline.evaluation.evaluate import evaluate as evaluate_maps
from almrr_pipeline.common.images import read_image
from almrr_pipeline.inference.predictor import Predictor, image_score
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.kedro_support.datasets import FillsFolder
from almrr_pipeline.reporting.examples import Result, draw_examples, write_examples


def map_anomalies(
    model: Path, manifest: pd.DataFrame, data_folder: Path, scan: ScanSettings, evaluate: EvaluateSettings
) -> FillsFolder:
    """Predict the anomaly map of every test image, at the size that the metrics are taken at."""
    predictor = Predictor(model, batch_size=evaluate.batch_size, scan_backend=scan.backend)
    images = [data_folder / name for name in _test_rows(manifest)["image"]]
    return AnomalyMaps.writer(predictor.maps(images, at="network"))


def score_images(maps: AnomalyMaps, manifest: pd.DataFrame, model: Path, data_folder: Path) -> pd.DataFrame:
    """Score every test image, and hold the scores against the model's own threshold."""
    settings = InferenceConfig.load(model)
    rows = _test_rows(manifest)
    return tabulate_scores(
        rows,
        maps,
        _ground_truth(rows, maps, data_folder),
        scores=[image_score(anomaly_map, settings.smoothing) for anomaly_map in maps],
        threshold=settings.thresholds.image.value if settings.thresholds else None,
    )


def measure(
    maps: AnomalyMaps,
    scores: pd.DataFrame,
    manifest: pd.DataFrame,
    model: Path,
    data_folder: Path,
    evaluate: EvaluateSettings,
    seed: int,
) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Compute all metrics; ROC, precision-recall and region overlap of the pixels; the first two of the images."""
    thresholds = InferenceConfig.load(model).thresholds
    rows = _test_rows(manifest)
    found = evaluate_maps(
        maps,
        _ground_truth(rows, maps, data_folder),
        scores["score"],
        scores["label"] == "defective",
        list(scores["defect"]),
        image_threshold=thresholds.image if thresholds else None,
        pixel_threshold=thresholds.pixel if thresholds else None,
        aupro_limits=evaluate.aupro_limits,
        bootstrap=evaluate.bootstrap,
        seed=seed,
        oracle=evaluate.oracle,
    )
    return found.metrics, found.roc, found.pr, found.pro, found.image_roc, found.image_pr


def draw_chosen_examples(
    maps: AnomalyMaps,
    scores: pd.DataFrame,
    manifest: pd.DataFrame,
    model: Path,
    data_folder: Path,
    report: ReportSettings,
) -> FillsFolder:
    """Draw the best, the typical and the worst cases, and list them with a caption each."""
    thresholds = InferenceConfig.load(model).thresholds
    rows = _test_rows(manifest)
    truth = _ground_truth(rows, maps, data_folder)
    places = {image: index for index, image in enumerate(rows["image"])}

    def load(image: str) -> Result:
        return read_image(data_folder / image), truth[places[image]], maps[places[image]]

    threshold = thresholds.pixel.value if thresholds else None
    overlays = draw_examples(scores, count=report.examples, load=load, threshold=threshold)
    return partial(write_examples, overlays)


def _test_rows(manifest: pd.DataFrame) -> pd.DataFrame:
    return manifest[manifest["split"] == "test"].reset_index(drop=True)


def _ground_truth(rows: pd.DataFrame, maps: AnomalyMaps, data_folder: Path) -> GroundTruth:
    return GroundTruth([data_folder / name if name else None for name in rows["mask"]], maps)
