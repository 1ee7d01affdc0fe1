"""Whether a map's values are the probabilities that they are called, and use their range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from almrr_pipeline.common.arrays import AnomalyMap, Floats, MaskArray

BINS = 10
_PERCENT = 99.0


@dataclass
class Reliability:
    """Pixels in equal bins of [0, 1], and the high values of each image, map by map."""

    pixels: Floats = field(default_factory=lambda: np.zeros(BINS))
    anomalous: Floats = field(default_factory=lambda: np.zeros(BINS))
    values: Floats = field(default_factory=lambda: np.zeros(BINS))  # their sum
    defective_high: list[float] = field(default_factory=list)
    normal_high: list[float] = field(default_factory=list)
    are_probabilities: bool = True

    def add(self, values: AnomalyMap, mask: MaskArray | None) -> None:
        """Count a map with its ground truth; None: a normal image."""
        if not values.size:
            return
        if values.min() < 0.0 or values.max() > 1.0:
            self.are_probabilities = False
        if not self.are_probabilities:
            return
        bins = np.minimum((values * BINS).astype(np.int64), BINS - 1)
        self.pixels += np.bincount(bins.ravel(), minlength=BINS)
        self.values += np.bincount(bins.ravel(), values.ravel(), minlength=BINS)
        if mask is None:
            self.normal_high.append(float(np.percentile(values, _PERCENT)))
        elif mask.any():
            self.anomalous += np.bincount(bins[mask], minlength=BINS)
            self.defective_high.append(float(np.percentile(values[mask], _PERCENT)))

    def summarize(self) -> dict[str, Any] | None:
        """Compare values with the fraction of anomalous pixels among those that have them.

        Expected calibration error after Naeini et al., AAAI 2015: the absolute difference of mean
        value and anomalous fraction over the bins, weighted by their pixels.

        Returns:
            calibration_error: in [0, 1].
            defective_p99: median over defective images of the value that 1 % of the pixels inside
                the mask exceed; None without a mask.
            normal_p99: the same of whole normal images; None without one.
            bins: rising; pixels, mean value and anomalous fraction of each that has pixels.
            None in all where a value was outside [0, 1], or no map was added.
        """
        filled = self.pixels > 0
        if not (self.are_probabilities and filled.any()):
            return None
        pixels = self.pixels[filled]
        mean, fraction = self.values[filled] / pixels, self.anomalous[filled] / pixels
        return {
            "calibration_error": float(np.average(np.abs(mean - fraction), weights=pixels)),
            "defective_p99": _median(self.defective_high),
            "normal_p99": _median(self.normal_high),
            "bins": [
                {"pixels": int(n), "mean_value": float(value), "anomalous_fraction": float(part)}
                for n, value, part in zip(pixels, mean, fraction, strict=True)
            ],
        }


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None
