"""Metrics of images and of pixels, or the reason why they are undefined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from almrr_pipeline.common.arrays import Bools, Floats
from almrr_pipeline.evaluation.bootstrap import percentile_interval
from almrr_pipeline.evaluation.curves import (
    Curve,
    auroc,
    average_precision,
    f1_max,
    previous,
    trace_curve,
)

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
    """Metrics of pixels; `absence` is the reason to give where no pixel is anomalous."""
    functions = _ranking_metrics("pixel")
    functions |= {name_aupro(limit): partial(aupro, limit=limit) for limit in limits}
    if not curve.positives:
        return CurveMetrics(None, functions, absence)
    if not curve.negatives:
        return CurveMetrics(None, functions, "no normal pixel in any test image")
    return CurveMetrics(curve, functions)


def _ranking_metrics(prefix: str) -> dict[str, Metric]:
    metrics = {"auroc": auroc, "ap": average_precision, "f1max": f1_max}
    return {f"{prefix}_{name}": metric for name, metric in metrics.items()}


def aupro(curve: Curve, limit: float) -> Floats:
    """Area under the per-region overlap curve up to a false positive rate, divided by that rate.

    Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.2.2: the mean over
    the regions (8-connected components of the ground truth) of the fraction that is found, against
    the false positive rate over the normal pixels of all test images; every region counts alike.

    The curve is piecewise linear: horizontal while only normal pixels are added, slanted where
    normal and anomalous pixels are tied. It is integrated exactly; the piece that crosses the limit
    is cut there.

    Args:
        curve: counts of pixels, with overlap; (..., K).
        limit: largest false positive rate, in (0, 1].

    Returns:
        In [0, 1], shape (...); nan without normal pixels or regions.
    """
    assert curve.overlap is not None, "only pixels have regions"
    end = np.asarray(limit * curve.negatives)[..., None]
    low, high = previous(curve.overlap), curve.overlap
    horizontal = np.minimum(curve.fp_above, end) - np.minimum(previous(curve.fp), end)
    slanted = np.asarray(curve.fp - curve.fp_above, dtype=np.float64)
    inside = np.clip(end - curve.fp_above, 0.0, slanted)
    fraction = np.divide(inside, slanted, out=np.zeros(inside.shape), where=slanted > 0)
    area = horizontal * low + inside * (low + (high - low) * fraction / 2.0)
    beyond = np.maximum(end[..., 0] - curve.fp[..., -1], 0.0) * high[..., -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((area.sum(axis=-1) + beyond) / end[..., 0])


def name_aupro(limit: float) -> str:
    """Key in metrics.json: aupro_30 for 0.3, aupro_05 for 0.05, aupro_12_5 for 0.125."""
    whole, _, rest = f"{100.0 * limit:.10g}".partition(".")
    return f"aupro_{whole:0>2}" + (f"_{rest}" if rest else "")
