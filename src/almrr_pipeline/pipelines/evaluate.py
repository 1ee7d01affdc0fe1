"""The evaluate pipeline: model + test images -> maps -> scores, metrics, curves, images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from almrr_pipeline.common.arrays import AnomalyMap
from almrr_pipeline.common.images import read_image
from almrr_pipeline.common.masks import MaskReading
from almrr_pipeline.common.region import show_counted
from almrr_pipeline.config import DataSettings, EvaluateSettings, InferenceSettings, ReportSettings
from almrr_pipeline.datasets.manifest import mask_reading
from almrr_pipeline.evaluation.evaluate import evaluate as evaluate_maps
from almrr_pipeline.evaluation.maps import (
    AnomalyMaps,
    GroundTruth,
    report_small_regions,
    tabulate_scores,
)
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.predictor import Predictor, image_score
from almrr_pipeline.inference.streams import take_batches
from almrr_pipeline.pipelines.per_category import step
from almrr_pipeline.reporting.examples import Result, draw_examples, pack_examples
from almrr_pipeline.reporting.gallery import Gallery, build_gallery


@dataclass(frozen=True)
class TestSet:
    """Rows of the manifest's test images, the folder of their paths, and the model's settings."""

    rows: pd.DataFrame
    folder: Path
    config: InferenceConfig
    mask_reading: MaskReading

    @property
    def pixel_value(self) -> float | None:
        """The threshold of the outlines, if there is one."""
        threshold = self.config.pixel_threshold
        return threshold.value if threshold else None

    def masks(self, maps: AnomalyMaps) -> GroundTruth:
        """Ground truth of the images, each at the size of its map."""
        paths = [self.folder / name if name else None for name in self.rows["mask"]]
        return GroundTruth(paths, maps, self.mask_reading, self.config.region)


def open_test_set(
    model: Path, manifest: pd.DataFrame, data_folder: Path, data: DataSettings
) -> TestSet:
    """Select the test images, and read what the model's folder holds for judging them."""
    rows = manifest[manifest["split"] == "test"].reset_index(drop=True)
    return TestSet(rows, data_folder, InferenceConfig.load(model), mask_reading(data))


def predict_maps(
    model: Path, test_set: TestSet, inference: InferenceSettings
) -> Iterator[dict[str, AnomalyMap]]:
    """Predict the anomaly map of every test image, at the size that the metrics are taken at.

    Yields:
        Maps by their place in the test set, a batch at a time: Kedro saves each before the next.
    """
    size, backend = inference.batch_size, inference.scan_backend
    predictor = Predictor(model, batch_size=size, scan_backend=backend)
    images = [test_set.folder / name for name in test_set.rows["image"]]
    for scaled in take_batches(predictor.map_predictor.maps(images), size):
        yield {f"{one.index:06d}": one.anomaly_map for one in scaled}


def score_images(maps: AnomalyMaps, test_set: TestSet) -> pd.DataFrame:
    """Score every test image, and compare the scores with the model's own threshold."""
    threshold, smoothing = test_set.config.image_threshold, test_set.config.smoothing
    return tabulate_scores(
        test_set.rows,
        maps,
        test_set.masks(maps),
        scores=[image_score(anomaly_map, smoothing) for anomaly_map in maps],
        threshold=threshold.value if threshold else None,
    )


def compute_metrics(
    maps: AnomalyMaps,
    scores: pd.DataFrame,
    test_set: TestSet,
    evaluate: EvaluateSettings,
    seed: int,
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Compute all metrics, and the curves of pixels and images by name."""
    truth = test_set.masks(maps)
    report_small_regions(truth)
    evaluation = evaluate_maps(
        maps,
        truth,
        scores["score"],
        scores["label"] == "defective",
        list(scores["defect_type"]),
        evaluate,
        thresholds=(test_set.config.image_threshold, test_set.config.pixel_threshold),
        seed=seed,
    )
    return evaluation.metrics, evaluation.curves


def draw_overlays(
    maps: AnomalyMaps, scores: pd.DataFrame, test_set: TestSet, report: ReportSettings
) -> dict[str, bytes]:
    """Draw the best, typical and worst results: files by name, among them an index of captions."""
    load, value = _reader(maps, test_set), test_set.pixel_value
    return pack_examples(draw_examples(scores, count=report.examples, load=load, threshold=value))


def collect_gallery(maps: AnomalyMaps, test_set: TestSet) -> Gallery:
    """Reduce every test image and its map to what the report's page has room for."""
    largest = max((float(anomaly_map.max()) for anomaly_map in maps), default=1.0)
    load, value = _reader(maps, test_set), test_set.pixel_value
    return build_gallery(test_set.rows["image"], load, largest=largest, threshold=value)


def _reader(maps: AnomalyMaps, test_set: TestSet) -> Callable[[str], Result]:
    """A function that reads an image of the test set, its ground truth and its map."""
    masks = test_set.masks(maps)
    places = {image: place for place, image in enumerate(test_set.rows["image"])}

    def load(image: str) -> Result:
        pixels = show_counted(
            read_image(test_set.folder / image, test_set.config.reading), test_set.config.region
        )
        return pixels, masks[places[image]], maps[places[image]]

    return load


# Maps and overlays are written as partitions and read as a folder: two entries of the catalog.
_MAPS = "anomaly_maps@folder"
NODES = [
    step(open_test_set, "model manifest data_folder params:data", "test_set"),
    step(predict_maps, "model test_set params:inference", "anomaly_maps@partitions"),
    step(score_images, f"{_MAPS} test_set", "scores"),
    step(compute_metrics, f"{_MAPS} scores test_set params:evaluate params:seed", "metrics curves"),
    step(draw_overlays, f"{_MAPS} scores test_set params:report", "overlays@partitions"),
    step(collect_gallery, f"{_MAPS} test_set", "gallery"),
]
