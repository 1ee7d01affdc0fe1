"""Which images show the same piece of surface, taken again under other light.

MT-defect holds about six exposures of every tile. A split that knows nothing of it puts some of a tile's images
into training and others into the test, and then normal test images are known from training while defective ones are
not: a method that only recognizes tiles passes for one that finds defects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter
from scipy.sparse.csgraph import connected_components

from almrr_pipeline.common.images import read_image, resize_image
from almrr_pipeline.common.progress import track

SAME_TILE = 0.7
"""Correlation above which two images show the same tile; on MT-defect fewer pairs lie near it than elsewhere."""
_SIDE = 96
_FINE, _COARSE, _LOCAL = 0.7, 5.0, 8.0
"""Widths in pixels: of the noise that is smoothed away, of the light that is taken off, of the contrast made equal."""
_SHIFT = 2
"""Pixels by which two takes of one tile may lie apart after resizing."""

Signatures = npt.NDArray[np.float32]


def group_by_tile(images: Sequence[Path]) -> list[int]:
    """Group images of the same tile: chains of images that each resemble the next one.

    Args:
        images: of any size.

    Returns:
        For each image the position, in `images`, of the first one of its group.

    Raises:
        AlmrrError: an image cannot be read.
    """
    _, labels = connected_components(resemblance(compute_signatures(images)) > SAME_TILE)
    first: dict[int, int] = {}
    return [first.setdefault(int(label), position) for position, label in enumerate(labels)]


def compute_signatures(images: Sequence[Path]) -> Signatures:
    """What remains of each image when light and contrast are taken off, (n, 96, 96), of mean 0 and length 1."""
    signatures = np.empty((len(images), _SIDE, _SIDE), np.float32)
    with track(len(images), unit="images", description="look for images of the same tile") as advance:
        for position, path in enumerate(images):
            signatures[position] = _compute_signature(path)
            advance(1)
    return signatures


def resemblance(signatures: Signatures) -> Signatures:
    """Correlation of each two images, at the best of the small shifts between them.

    Args:
        signatures: from `compute_signatures`, (n, S, S).

    Returns:
        Symmetric, (n, n), in [-1, 1].
    """
    flat = signatures.reshape(len(signatures), -1)
    best = np.full((len(flat), len(flat)), -1.0, np.float32)
    for rows in range(-_SHIFT, _SHIFT + 1):
        for columns in range(-_SHIFT, _SHIFT + 1):
            shifted = np.roll(signatures, (rows, columns), axis=(1, 2)).reshape(flat.shape)
            np.maximum(best, shifted @ flat.T, out=best)
    symmetric: Signatures = np.maximum(best, best.T)
    return symmetric


def _compute_signature(path: Path) -> Signatures:
    gray = resize_image(read_image(path), (_SIDE, _SIDE)).mean(axis=2)
    detail = gaussian_filter(gray, _FINE) - gaussian_filter(gray, _COARSE)
    detail /= np.sqrt(gaussian_filter(detail**2, _LOCAL)) + 1e-6
    detail -= detail.mean()
    signature: Signatures = (detail / max(float(np.linalg.norm(detail)), 1e-6)).astype(np.float32)
    return signature
