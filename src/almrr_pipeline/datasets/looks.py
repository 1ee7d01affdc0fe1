"""How alike images look: correlation of their fine structure, without illumination and contrast."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.images import resize_image

NEAR_DUPLICATE = 0.95
"""Correlation above which two images are taken for one, saved again."""
SAME_SPECIMEN = 0.7
"""Correlation above which two images may show the same piece of surface.

Of 101025 pairs of MT-defect's images it finds 99 % of those that `same_tile` finds with four times
the pixels, and 4 % of what it finds are others.
"""
MOST_COMPARED = 3000
"""Images of a folder whose looks are compared; so many take some seconds and 30 MB."""
_SIDE = 48  # pixels of a look; 9 kB an image
_FINE, _COARSE, _LOCAL = 0.5, 2.5, 4.0
"""Gaussian widths in pixels: noise removed, illumination removed, local contrast normalized."""
_FLAT = 0.25  # gray values; the structure of images with less is noise of compression
_SHIFTS = (-1, 0, 1)  # pixels of a look by which two photographs may be apart
_BLOCK = 256  # looks compared at once, so that memory stays bounded

Look = npt.NDArray[np.float32]


def compute_look(image: ImageArray) -> Look:
    """Fine structure of an image: (48, 48), mean 0 and norm 1; all 0 where there is none."""
    gray = resize_image(image, (_SIDE, _SIDE)).mean(axis=2)
    detail = gaussian_filter(gray, _FINE) - gaussian_filter(gray, _COARSE)
    if detail.std() < _FLAT:
        return np.zeros((_SIDE, _SIDE), np.float32)
    detail /= np.sqrt(gaussian_filter(detail**2, _LOCAL)) + 1e-6
    detail -= detail.mean()
    return np.asarray(detail / max(float(np.linalg.norm(detail)), 1e-6), np.float32)


def is_compared(index: int, count: int) -> bool:
    """Whether an image, by its place among `count`, is one of the evenly spaced ones compared."""
    return index % (math.ceil(count / MOST_COMPARED) or 1) == 0


def similar_pairs(first: Look, second: Look) -> Iterator[tuple[int, int, float]]:
    """Yield index, index and correlation above SAME_SPECIMEN of looks (n, 48, 48), (m, 48, 48)."""
    flat = second.reshape(len(second), -1)
    for start in range(0, len(first), _BLOCK):
        block = first[start : start + _BLOCK]
        best = np.full((len(block), len(second)), -1.0, np.float32)
        for rows in _SHIFTS:
            for columns in _SHIFTS:
                shifted = np.roll(block, (rows, columns), (1, 2)).reshape(len(block), -1)
                np.maximum(best, shifted @ flat.T, out=best)
        for row, column in np.argwhere(best > SAME_SPECIMEN):
            yield start + int(row), int(column), float(best[row, column])
