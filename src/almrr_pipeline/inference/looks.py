"""How an image looks as a whole, and whether that is unlike the normal images of the calibration.

Thresholds hold for images from the process that they were chosen on. Another exposure, focus or
encoding changes all scores without a word; here it is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.config import Section

_ROWS = 256  # that are looked at, evenly spaced, so that large images cost little
_FEWEST = 5  # images that tell how much they vary
_MIDDLE = (0.05, 0.95)  # quantiles
_SLACK = 0.1  # of a limit, for what few images do not show
_STEP = 0.5  # gray values, for images that are nearly black
_WORDS = {
    "brightness": ("darker", "brighter"),
    "contrast": ("lower in contrast", "higher in contrast"),
    "sharpness": ("less sharp", "sharper"),
}


class Look(NamedTuple):
    """Statistics of an image's gray values, in [0, 255]."""

    brightness: float  # mean
    contrast: float  # standard deviation
    sharpness: float  # mean difference of horizontal neighbors


class UsualLook(Section):
    """Quantiles .05 and .95 of each statistic over the normal images of the calibration."""

    brightness: tuple[float, float]
    contrast: tuple[float, float]
    sharpness: tuple[float, float]

    def differences(self, look: Look) -> tuple[str, ...]:
        """In what an image is far from the usual: "darker", "less sharp", ...

        The limits are the quantiles, each moved outwards by their distance, and a tenth more: five
        standard deviations where the statistic is normal, and no single odd image of the
        calibration moves them. Half the exposure is beyond where brightness varies by less than a
        tenth of its mean.
        """
        found = []
        for name, value in look._asdict().items():
            low, high = getattr(self, name)
            width, (below, above) = high - low, _WORDS[name]
            if value < (low - width) * (1 - _SLACK) - _STEP:
                found.append(below)
            elif value > (high + width) * (1 + _SLACK) + _STEP:
                found.append(above)
        return tuple(found)


def measure_look(image: ImageArray) -> Look:
    """Measure an image, uint8 RGB of shape (H, W, 3)."""
    rows = image[:: max(1, len(image) // _ROWS)]
    red, green, blue = np.moveaxis(rows.astype(np.float32), 2, 0)
    gray = (red + green + blue) / np.float32(3)  # a quarter of the time of numpy's mean
    steps = np.abs(np.diff(gray, axis=1)).mean() if gray.shape[1] > 1 else 0.0
    return Look(float(gray.mean()), float(gray.std()), float(steps))


def find_usual(looks: Sequence[Look]) -> UsualLook | None:
    """What is usual among images; None for fewer than five, which do not tell."""
    if len(looks) < _FEWEST:
        return None
    low, high = np.quantile(np.array(looks), _MIDDLE, axis=0).round(2).tolist()
    ends = zip(low, high, strict=True)
    return UsualLook(**dict(zip(Look._fields, ends, strict=True)))


def describe_drift(count: int, unlike: Counter[str]) -> str | None:
    """A warning where half of `count` images or more are unlike the usual in one way, or None.

    unlike: numbers of images by `UsualLook.differences`.
    """
    most = [f"{n} are {how}" for how, n in unlike.most_common() if 2 * n >= count]
    if not most:
        return None
    return (
        f"Of {count} images {', '.join(most)} than the normal images that the model was "
        "calibrated with, so that its thresholds may not hold; check exposure, focus and the "
        "range of values, or calibrate it with images like these."
    )
