"""Metrics of images and of pixels, or the reason why they are undefined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from almrr_pipeline.common.arrays import Bools, Floats
from almrr_pipeline.evaluation.aupro import aupro, name_aupro
from almrr_pipeline.evaluation.bootstrap import percentile_interval
from almrr_pipeline.evaluation.curves import Curve, auroc, average_precision, f1_max, trace_curve

Metric = Callable[[Curve], Floats]


@dataclass(frozen=True)
class CurveMetrics:
    """Metrics of one set of images or pixels.

    Attributes:
        curve: None where the metrics are undefined.
        functions: how each metric is computed, by its key in metrics.json.
        reason: why the metrics are undefined; empty where they are not.
    """

    curve: Curve | None
    functions: dict[str, Metric]
    reason: str = ""

    def values(self) -> dict[str, float | None]:
        """Each metric, in [0, 1]; None where undefined."""
        return {
            name: None if self.curve is None else float(metric(self.curve))
            for name, metric in self.functions.items()
        }

    def undefined(self) -> dict[str, str]:
        """The reason by metric; empty where all are defined."""
        return dict.fromkeys(self.functions, self.reason) if self.curve is None else {}

    def intervals(self, resampled: Iterable[Curve]) -> dict[str, list[float]]:
        """95 % interval [low, high] of each metric from resampled curves; empty where undefined."""
        if self.curve is None:
            return {}
        drawn = [[metric(curve) for metric in self.functions.values()] for curve in resampled]
        return {
            name: list(percentile_interval(np.concatenate(values)))
            for name, values in zip(self.functions, zip(*drawn, strict=True), strict=True)
        }


def image_metrics(scores: Floats, labels: Bools) -> CurveMetrics:
    """Metrics of image scores; labels are True where defective, both of shape (n,)."""
    functions = _ranking_metrics("image")
    if not labels.any():
        return CurveMetrics(None, functions, "no defective test image")
    if labels.all():
        return CurveMetrics(None, functions, "no normal test image")
    return CurveMetrics(trace_curve(scores, labels), functions)


def pixel_metrics(curve: Curve, limits: Sequence[float], *, absence: str) -> CurveMetrics:
    """Metrics of pixels.

    Args:
        curve: counts of pixels; may be empty.
        limits: false positive rates up to which the per-region overlap is integrated.
        absence: the reason to give where no pixel is anomalous.
    """
    functions = _ranking_metrics("pixel")
    functions |= {name_aupro(limit): partial(aupro, limit=limit) for limit in limits}
    if not curve.positives:
        return CurveMetrics(None, functions, absence)
    if not curve.negatives:
        return CurveMetrics(None, functions, "no normal pixel in any test image")
    return CurveMetrics(curve, functions)


def _ranking_metrics(prefix: str) -> dict[str, Metric]:
    return {
        f"{prefix}_auroc": auroc,
        f"{prefix}_ap": average_precision,
        f"{prefix}_f1max": f1_max,
    }
