"""Grouping of images that show the same piece of surface under different light.

MT-defect has about six exposures of every tile. A split by image puts some of a tile's exposures
into training and others into the test. Normal test images are then known from training and
defective ones are not, so that a method which only recognizes tiles seems to find defects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter
from scipy.sparse.csgraph import connected_components

from almrr_pipeline.common.images import Reading, read_image
from almrr_pipeline.common.progress import track
from almrr_pipeline.common.region import Region, resize_counted

SAME_TILE = 0.7
"""Correlation above which two images show the same tile.

Fewer of MT-defect's pairs of images are near it than near any other value.
"""
_SIDE = 96
_FINE, _COARSE, _LOCAL = 0.7, 5.0, 8.0
"""Gaussian widths in pixels: noise removed, illumination removed, local contrast normalized."""
_SHIFT = 2  # largest misalignment of two exposures of a tile, in pixels after resizing

Signatures = npt.NDArray[np.float32]


def group_by_tile(images: Sequence[Path]) -> list[int]:
    """Group images, of any size, of the same tile: connected components of `correlations`.

    Returns:
        For each image the position, in `images`, of the first one of its group.
    """
    _, labels = connected_components(correlations(compute_signatures(images)) > SAME_TILE)
    first: dict[int, int] = {}
    return [first.setdefault(int(label), position) for position, label in enumerate(labels)]


def compute_signatures(
    images: Sequence[Path], reading: Reading | None = None, region: Region | None = None
) -> Signatures:
    """Remove illumination and local contrast; returns (n, 96, 96), each of mean 0 and norm 1."""
    signatures = np.empty((len(images), _SIDE, _SIDE), np.float32)
    description = "look for images of the same tile"
    with track(len(images), unit="images", description=description) as advance:
        for position, path in enumerate(images):
            image = read_image(path, reading)
            gray = resize_counted(image, (_SIDE, _SIDE), region).mean(axis=2)
            detail = gaussian_filter(gray, _FINE) - gaussian_filter(gray, _COARSE)
            detail /= np.sqrt(gaussian_filter(detail**2, _LOCAL)) + 1e-6
            detail -= detail.mean()
            signatures[position] = detail / max(float(np.linalg.norm(detail)), 1e-6)
            advance(1)
    return signatures


def correlations(signatures: Signatures) -> Signatures:
    """Correlate all pairs of signatures, (n, S, S), at the best small shift: (n, n) in [-1, 1]."""
    flat = signatures.reshape(len(signatures), -1)
    best = np.full((len(flat), len(flat)), -1.0, np.float32)
    for rows in range(-_SHIFT, _SHIFT + 1):
        for columns in range(-_SHIFT, _SHIFT + 1):
            shifted = np.roll(signatures, (rows, columns), axis=(1, 2)).reshape(flat.shape)
            np.maximum(best, shifted @ flat.T, out=best)
    return np.asarray(np.maximum(best, best.T))
