"""All metrics of a test set, from anomaly maps and image scores: metrics.json and the curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from almrr_pipeline.common.arrays import AnomalyMap, Bools, Floats, Indices, MaskArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import EvaluateSettings
from almrr_pipeline.evaluation import bootstrap, curves
from almrr_pipeline.evaluation import pixels as px
from almrr_pipeline.evaluation.curves import Curve
from almrr_pipeline.evaluation.maps import GroundTruth
from almrr_pipeline.evaluation.pixels import Indexed, LabeledMaps
from almrr_pipeline.evaluation.reliability import Reliability
from almrr_pipeline.evaluation.thresholds import Threshold, proportion, rates_at

Metric = Callable[[Curve], Floats]
_RANKING: dict[str, Metric] = {
    "auroc": curves.auroc,
    "ap": curves.average_precision,
    "f1max": curves.f1_max,
}
Metrics = dict[str, Any]
"""Ready for JSON: numbers, None, text, and lists and dictionaries of them."""


@dataclass(frozen=True)
class Evaluation:
    """Result of one test set; docs/metrics.md describes each metric.

    The curves have at most 1000 rows each, none where undefined. Of pixels: `roc` (fpr, tpr,
    threshold), `pr` (recall, precision, threshold), `pro` (fpr up to the largest limit, pro). Of
    images: `image_roc`, `image_pr`.
    """

    metrics: Metrics
    curves: dict[str, pd.DataFrame]


def evaluate(
    maps: Indexed[AnomalyMap],
    masks: Indexed[MaskArray | None] | None,
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    defect_types: Sequence[str],
    settings: EvaluateSettings,
    *,
    thresholds: tuple[Threshold | None, Threshold | None],
    seed: int = 0,
) -> Evaluation:
    """Compute every metric of a test set, exactly, reading the maps one at a time, twice at most.

    Args:
        maps: anomaly maps, float32 (H, W), larger is more anomalous; sizes may vary.
        masks: ground truth, as in `LabeledMaps`; pixels outside of its region are left out.
        scores: image scores, larger is more anomalous, shape (n,).
        labels: True where the image is defective, shape (n,).
        defect_types: defect type of each image, length n; used of defective ones only.
        settings: limits of AUPRO, resamplings, and whether to report oracle_* too.
        thresholds: of the image scores and of the maps' values, from validation images, if any.
        seed: of the resampling.

    Raises:
        AlmrrError: lengths or shapes differ, a value is not finite, a normal image is anomalous.
    """
    ranked, labeled, of_type = _checked(len(maps), masks, scores, labels, defect_types)
    image_threshold, pixel_threshold = thresholds
    image_value = None if image_threshold is None else image_threshold.value
    images = _measure_images(ranked, labeled)
    region = masks.region if isinstance(masks, GroundTruth) else None
    labeled_maps = LabeledMaps(maps, masks, labeled, region)
    pixels = _measure_pixels(labeled_maps, of_type, pixel_threshold, settings.aupro_limits)
    tables = curves.tabulate_curves(pixels.overall.curve, max(settings.aupro_limits))
    of_images = curves.tabulate_curves(images.curve)
    metrics: Metrics = {
        **images.values(),
        **pixels.overall.values(),
        "pixel_defective_fraction": pixels.anomalous_fraction(),
        "reliability": pixels.reliability.summarize(),
        "counts": pixels.count(np.ones_like(labeled)),
        "thresholds": {
            "image": _describe_threshold(image_threshold, ranked, labeled),
            "pixel": pixels.describe_threshold(pixel_threshold),
        },
        "intervals": _estimate_intervals(images, pixels, ranked, settings.bootstrap, seed),
        "defect_types": {
            name: _describe_defect_type(ranked, pixels, name, chosen, image_value)
            for name, chosen in of_type.items()
        },
        "undefined": {**images.undefined(), **pixels.overall.undefined()},
    }
    if settings.oracle:
        metrics |= _choose_on_test_set(images.curve, pixels.overall.curve)
    return Evaluation(
        metrics, tables | {f"image_{name}": of_images[name] for name in ("roc", "pr")}
    )


@dataclass(frozen=True)
class _CurveMetrics:
    """Metrics of one set of images or pixels, by their keys in metrics.json."""

    functions: dict[str, Metric]
    curve: Curve | None  # None where the metrics are undefined
    reason: str  # why they would be

    def values(self) -> dict[str, float | None]:
        """Each metric, in [0, 1]; None where undefined."""
        if self.curve is None:
            return dict.fromkeys(self.functions)
        return {name: float(metric(self.curve)) for name, metric in self.functions.items()}

    def undefined(self) -> dict[str, str]:
        """The reason by metric; empty where all are defined."""
        return dict.fromkeys(self.functions, self.reason) if self.curve is None else {}

    def intervals(self, resampled: Iterable[Curve]) -> dict[str, list[float]]:
        """95 % interval [low, high] of each metric from resampled curves; empty where undefined."""
        if self.curve is None:
            return {}
        drawn = [[metric(curve) for metric in self.functions.values()] for curve in resampled]
        intervals = map(bootstrap.percentile_interval, np.concatenate(drawn, axis=1))
        return dict(zip(self.functions, map(list, intervals), strict=True))


def _measure_images(scores: Floats, labels: Bools) -> _CurveMetrics:
    reason = "no normal test image" if labels.any() else "no defective test image"
    curve = curves.trace_curve(scores, labels) if labels.any() and not labels.all() else None
    return _CurveMetrics({f"image_{name}": _RANKING[name] for name in _RANKING}, curve, reason)


@dataclass(frozen=True)
class _Pixels:
    """Pixels and their metrics, of all images and by defect type."""

    labels: Bools
    known: Bools  # where the ground truth is known
    anomalous: px.AnomalousPixels
    counts: px.ImageCounts
    reliability: Reliability
    overall: _CurveMetrics
    by_type: dict[str, _CurveMetrics]

    def anomalous_fraction(self) -> float | None:
        """Fraction of anomalous pixels where the ground truth is known; None without any."""
        positives, negatives = len(self.anomalous.score), int(self.counts.normals.sum())
        known = self.labels[self.known].any()
        return _divide(positives, positives + negatives) if known else None

    def describe_threshold(self, threshold: Threshold | None) -> Metrics:
        """The threshold, its rates, and the fractions of normal and anomalous pixels above it."""
        outlined = found = None
        if threshold is not None and threshold.value is not None:
            lowest = px.just_above(threshold.value)
            place = np.flatnonzero(self.counts.edge == lowest)[0]  # it is one of the edges
            normal = self.counts.normal[:, place]
            outlined = _divide(normal.sum(), self.counts.normals.sum())
            found = _divide((self.anomalous.score >= lowest).sum(), self.anomalous.score.size)
        return _describe_threshold(threshold, self.counts.peak, self.labels) | {
            "normal_pixels_outlined": outlined,
            "defective_pixels_outlined": found,
        }

    def count(self, chosen: Bools) -> dict[str, int]:
        """Count images, pixels and regions of the chosen images, shape (n,)."""
        of_image, defective = self.anomalous.image, chosen & self.labels
        regions = np.bincount(of_image, minlength=len(chosen))
        pixels = np.bincount(of_image, self.anomalous.area, minlength=len(chosen))
        counts = {
            "images": chosen.sum(),
            "normal_images": (chosen & ~self.labels).sum(),
            "defective_images": defective.sum(),
            "defective_images_without_mask": (defective & ~self.known).sum(),
            "defective_images_with_empty_mask": (defective & self.known & (regions == 0)).sum(),
            "normal_pixels": self.counts.normals[chosen].sum(),
            "defective_pixels": pixels[chosen].sum(),
            "regions": regions[chosen].sum(),
        }
        return {name: int(count) for name, count in counts.items()}


def _checked(
    count: int,
    masks: Indexed[MaskArray | None] | None,
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    defect_types: Sequence[str],
) -> tuple[Floats, Bools, dict[str, Bools]]:
    """Scores, labels, and the images of each defect type, after checks of lengths and scores."""
    ranked, labeled = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    lengths = {"maps": count, "masks": count if masks is None else len(masks)}
    lengths |= {"scores": len(ranked), "labels": len(labeled), "defect_types": len(defect_types)}
    if len(set(lengths.values())) > 1:
        raise AlmrrError(
            f"The test set does not fit together: {lengths}; evaluate the manifest's test rows, "
            "all in one order."
        )
    for index in np.flatnonzero(~np.isfinite(ranked)):
        raise AlmrrError(
            f"The score of test image {index} is {ranked[index]}; the model's weights are broken, "
            "train again."
        )
    types = np.asarray(defect_types, dtype=object)
    of_type = {str(name): labeled & (types == name) for name in sorted(set(types[labeled]))}
    return ranked, labeled, of_type


def _measure_pixels(
    images: LabeledMaps,
    of_type: dict[str, Bools],
    threshold: Threshold | None,
    limits: Sequence[float],
) -> _Pixels:
    """Read the maps: anomalous pixels, then normal pixels of normal images and by defect type."""
    reliability = Reliability()
    anomalous, known = px.gather_anomalous(images, reliability)
    thresholds = anomalous.score[anomalous.last_of_score()]
    edges = px.choose_edges(anomalous, None if threshold is None else threshold.value)
    counts = px.ImageCounts.empty(edges, len(known))

    def measure(defective: Bools, normal: Indices) -> _CurveMetrics:
        curve = px.trace_pixels(anomalous.of_images(defective), thresholds, normal)
        functions = {f"pixel_{name}": _RANKING[name] for name in _RANKING}
        functions |= {curves.name_aupro(end): partial(curves.aupro, limit=end) for end in limits}
        reason = _explain_absence(curve, defective, known, images.masks)
        return _CurveMetrics(functions, None if reason else curve, reason)

    normal_images = ~images.labels
    of_normal = total = px.count_normal(images, normal_images, thresholds, counts, reliability)
    by_type = {}
    for name, chosen in of_type.items():
        of_this = px.count_normal(images, chosen & known, thresholds, counts)
        total = total + of_this  # a new array: both began as one
        by_type[name] = measure(chosen, of_normal + of_this)
    for index in map(int, np.flatnonzero(~known)):
        counts.peak[index] = images.read(index)[0].max()
    overall = measure(images.labels, total)
    return _Pixels(images.labels, known, anomalous, counts, reliability, overall, by_type)


def _divide(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _explain_absence(curve: Curve, defective: Bools, known: Bools, masks: object) -> str:
    """Why the metrics of pixels are undefined; empty if they are not."""
    if curve.positives:
        return "" if curve.negatives else "no normal pixel in any test image"
    if not defective.any():
        return "no defective test image"
    if not (defective & known).any():
        return "no ground truth mask for any defective test image"
    if isinstance(masks, GroundTruth):
        return masks.explain_emptiness(map(int, np.flatnonzero(defective & known)))
    return "no anomalous pixel in any mask"


def _describe_threshold(threshold: Threshold | None, scores: Floats, labels: Bools) -> Metrics:
    """The threshold, its guarantee, and its rates on the test set."""
    if threshold is None:
        return {"value": None, "undefined": "no threshold was given"}
    rates = {} if threshold.value is None else rates_at(scores, labels, threshold.value)
    return asdict(threshold) | {name: asdict(rate) for name, rate in rates.items()}


def _describe_defect_type(
    scores: Floats, pixels: _Pixels, name: str, of_type: Bools, threshold: float | None
) -> Metrics:
    """Metrics of one defect type against all normal test images, and how often it was detected."""
    chosen = ~pixels.labels | of_type
    of_images = _measure_images(scores[chosen], pixels.labels[chosen])
    of_pixels = pixels.by_type[name]
    detections = None if threshold is None else asdict(proportion(scores[of_type] > threshold))
    return {
        **of_images.values(),
        **of_pixels.values(),
        "detections": detections,
        "counts": pixels.count(chosen),
        "undefined": of_images.undefined() | of_pixels.undefined(),
    }


def _estimate_intervals(
    images: _CurveMetrics, pixels: _Pixels, scores: Floats, resamplings: int, seed: int
) -> Metrics:
    """95 % intervals of all defined metrics, from the same resamplings of the images."""
    if resamplings == 0:
        return {}
    weights = bootstrap.draw_weights(pixels.labels, resamplings, np.random.default_rng(seed))
    of_pixels = bootstrap.resample_pixels(pixels.counts, pixels.anomalous, weights)
    of_images = bootstrap.resample_images(scores, pixels.labels, weights)
    return images.intervals(of_images) | pixels.overall.intervals(of_pixels)


def _choose_on_test_set(images: Curve | None, pixels: Curve | None) -> Metrics:
    """Results of thresholds chosen on the test set itself: upper bounds."""
    names = ("image_threshold", "image_accuracy", "pixel_threshold", "pixel_iou")
    chosen: Metrics = {f"oracle_{name}": None for name in names}
    if images is not None:
        correct = max(images.negatives, (images.tp + images.negatives - images.fp).max())
        total = images.positives + images.negatives
        chosen["oracle_image_threshold"] = curves.best_f1_threshold(images)
        chosen["oracle_image_accuracy"] = float(correct / total)
    if pixels is not None:
        best = float(curves.f1_max(pixels))
        chosen["oracle_pixel_threshold"] = curves.best_f1_threshold(pixels)
        chosen["oracle_pixel_iou"] = best / (2.0 - best)
    return chosen
