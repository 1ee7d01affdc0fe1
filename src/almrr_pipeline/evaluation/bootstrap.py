"""Uncertainty from the choice of the test images: percentile intervals of a bootstrap over images.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Images, not pixels, are drawn with
replacement, normal and defective ones separately, so that each resampling has as many of both as the test set.
Training is not repeated: the intervals say nothing about other seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from almrr_pipeline.evaluation.curves import Curve, Floats, shift, trace_curve
from almrr_pipeline.evaluation.pixels import Bools, DefectivePixels, ImageCounts

Weights = npt.NDArray[np.int64]
"""How often each image was drawn, one row a resampling, shape (B, n)."""

_BLOCK = 64
"""Resamplings that are evaluated together."""
_OVERLAP_STEP = 2.0**-32


def draw_weights(labels: Bools, resamplings: int, generator: np.random.Generator) -> Weights:
    """Draw images with replacement, normal and defective ones separately.

    Args:
        labels: True where defective, shape (n,).
        resamplings: B, at least 1.
        generator: source of randomness.

    Returns:
        int64 (B, n); a row sums to the number of normal images over the normal, of defective over the defective.
    """
    weights = np.zeros((resamplings, len(labels)), dtype=np.int64)
    for stratum in (~labels, labels):
        size = int(stratum.sum())
        if size:
            weights[:, stratum] = generator.multinomial(size, np.full(size, 1.0 / size), size=resamplings)
    return weights


def percentile_interval(values: npt.ArrayLike) -> tuple[float, float]:
    """The middle 95 % of a metric's resampled values, shape (B,); those that are undefined (nan) do not count."""
    low, high = np.nanpercentile(np.asarray(values), [2.5, 97.5])
    return float(low), float(high)


def resample_images(scores: Floats, labels: Bools, weights: Weights) -> Iterator[Curve]:
    """Curves of image scores, exact, in blocks of resamplings."""
    for start in range(0, len(weights), _BLOCK):
        yield trace_curve(scores, labels, weights[start : start + _BLOCK])


@dataclass(frozen=True)
class PixelResampler:
    """Per-image counts at fixed edges, so that a resampling's curve is one matrix product.

    Between two edges normal and defective pixels are taken as evenly mixed; `build` says how little that changes.

    Attributes:
        images: normal pixels of each image at E edges.
        members: the images that have defective pixels, shape (m,).
        defective: their defective pixels that reach each edge, shape (m, E).
        overlap: sum over each one's regions of the share that reaches the edge, shape (m, E).
    """

    images: ImageCounts
    members: npt.NDArray[np.int64]
    defective: Floats
    overlap: Floats

    @classmethod
    def build(cls, images: ImageCounts, defective: DefectivePixels) -> PixelResampler:
        """Count each image's defective pixels at the edges that `choose_edges` chose.

        Exact where the test set has at most 2048 distinct defective scores; otherwise each curve is known at 1023 or
        more even steps of recall and of overlap, which moves a metric by less than 1e-3.
        """
        members, row = np.unique(defective.image, return_inverse=True)
        edges = len(images.edge)
        step = edges - np.searchsorted(images.edge[::-1], defective.score, side="right")
        cell = row[defective.region] * edges + step
        shape = (len(members), edges)
        pixels = np.bincount(cell, minlength=shape[0] * edges).reshape(shape)
        shares = np.bincount(cell, weights=defective.weight, minlength=shape[0] * edges).reshape(shape)
        # multiples of 2^-32 add up without rounding, so that the order in which a matrix product adds does not matter
        overlap = np.rint(np.cumsum(shares, axis=1) / _OVERLAP_STEP) * _OVERLAP_STEP
        return cls(images, members, np.cumsum(pixels, axis=1).astype(np.float64), overlap)

    def resample(self, weights: Weights) -> Iterator[Curve]:
        """Curves of pixels in blocks of resamplings; weights of shape (B, n)."""
        for start in range(0, len(weights), _BLOCK):
            drawn = weights[start : start + _BLOCK].astype(np.float64)  # (b, n)
            drawn_members = drawn[:, self.members]  # (b, m)
            true, overlap = drawn_members @ self.defective, drawn_members @ self.overlap
            regions = overlap[:, -1:]  # every region is found whole at the lowest edge
            false = drawn @ self.images.normal
            yield Curve(
                level=self.images.edge,
                true=true,
                false=false,
                false_before=shift(false),
                defective=true[:, -1],
                normal=drawn @ self.images.normals,
                overlap=np.divide(overlap, regions, out=np.full_like(overlap, np.nan), where=regions > 0),
            )
