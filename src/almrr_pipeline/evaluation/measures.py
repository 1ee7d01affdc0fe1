"""Which figures are read off a curve of images and off one of pixels, and why there may be none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from almrr_pipeline.evaluation.aupro import aupro, name_aupro
from almrr_pipeline.evaluation.bootstrap import percentile_interval
from almrr_pipeline.evaluation.curves import Curve, Floats, auroc, average_precision, f1_max, trace_curve
from almrr_pipeline.evaluation.pixels import Bools, DefectivePixels, NormalCounts, trace_pixels

Measure = Callable[[Curve], Floats]


@dataclass(frozen=True)
class Measured:
    """Metrics of one set of units.

    Attributes:
        curve: None where the metrics are undefined.
        measures: how each metric is computed, by its name in metrics.json.
        reason: why the metrics are undefined; empty where they are not.
    """

    curve: Curve | None
    measures: dict[str, Measure]
    reason: str = ""

    def values(self) -> dict[str, float | None]:
        """Each metric, in [0, 1]; None where undefined."""
        return {name: float(measure(self.curve)) if self.curve else None for name, measure in self.measures.items()}

    def undefined(self) -> dict[str, str]:
        """The reason, by metric; empty where all are defined."""
        return {} if self.curve else dict.fromkeys(self.measures, self.reason)

    def intervals(self, resampled: Iterable[Curve]) -> dict[str, list[float]]:
        """95 % interval [low, high] of each metric from resampled curves; nothing where undefined."""
        if self.curve is None:
            return {}
        drawn: dict[str, list[Floats]] = {name: [] for name in self.measures}
        for curve in resampled:
            for name, measure in self.measures.items():
                drawn[name].append(measure(curve))
        return {name: list(percentile_interval(np.concatenate(parts))) for name, parts in drawn.items()}


def measure_images(scores: Floats, labels: Bools) -> Measured:
    """Metrics of images by their scores; undefined unless there are both normal and defective ones.

    Args:
        scores: shape (n,).
        labels: True where defective, shape (n,).
    """
    measures: dict[str, Measure] = {"image_auroc": auroc, "image_ap": average_precision, "image_f1max": f1_max}
    if not labels.any():
        return Measured(None, measures, "no defective test image")
    if labels.all():
        return Measured(None, measures, "no normal test image")
    return Measured(trace_curve(scores, labels), measures)


def measure_pixels(
    defective: DefectivePixels,
    levels: npt.NDArray[np.float32],
    normal: NormalCounts,
    *,
    limits: Sequence[float],
    absence: str,
) -> Measured:
    """Metrics of pixels; undefined unless there are both normal and defective ones.

    Args:
        defective: defective pixels of the images in question.
        levels: falling levels at which the normal pixels were counted.
        normal: normal pixels of the images in question, at those levels.
        limits: false positive rates up to which the overlap curve is integrated.
        absence: the reason to give where no pixel is defective.
    """
    measures: dict[str, Measure] = {"pixel_auroc": auroc, "pixel_ap": average_precision, "pixel_f1max": f1_max}
    measures |= {name_aupro(limit): _integrate_to(limit) for limit in limits}
    if not defective.score.size:
        return Measured(None, measures, absence)
    if not normal.total:
        return Measured(None, measures, "no normal pixel in any test image")
    return Measured(trace_pixels(defective, levels, normal), measures)


def _integrate_to(limit: float) -> Measure:
    return lambda curve: aupro(curve, limit)
