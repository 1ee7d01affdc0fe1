"""Confidence intervals by bootstrap over the test images, percentile method.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Images, not pixels, are
drawn with replacement, as the pixels of an image are not independent; normal and defective images
separately, so that each resampling has as many of both as the test set. The model is not trained
again: the intervals do not cover the variation between seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from almrr_pipeline.common.arrays import Bools, Floats
from almrr_pipeline.evaluation.curves import Curve, previous, trace_curve
from almrr_pipeline.evaluation.pixels import AnomalousPixels, ImageCounts

Weights = npt.NDArray[np.int32]
_BLOCK = 64
"""Resamplings that are evaluated together; bounds the memory."""
_IMAGES = 1024
"""Images whose pixels are counted together; bounds the memory of larger test sets."""
_OVERLAP_STEP = 2.0**-32
"""Overlaps are rounded to multiples of it, which add up without rounding: a matrix product then
does not depend on its order of summation."""


def draw_weights(labels: Bools, resamplings: int, generator: np.random.Generator) -> Weights:
    """Draw images with replacement, normal and defective ones (True in `labels`) separately.

    How often each of n images was drawn in each of B resamplings is returned, shape (B, n).
    """
    weights = np.zeros((resamplings, len(labels)), dtype=np.int32)
    for stratum in (~labels, labels):
        size = int(stratum.sum())
        if size:
            chances = np.full(size, 1.0 / size)
            for start in range(0, resamplings, _BLOCK):  # of 64-bit numbers
                rows = weights[start : start + _BLOCK]
                rows[:, stratum] = generator.multinomial(size, chances, size=len(rows))
    return weights


def percentile_interval(values: npt.ArrayLike) -> tuple[float, float]:
    """Middle 95 % of a metric's resampled values, shape (B,); undefined ones (nan) do not count."""
    low, high = np.nanpercentile(np.asarray(values), [2.5, 97.5])
    return float(low), float(high)


def resample_images(scores: Floats, labels: Bools, weights: Weights) -> Iterator[Curve]:
    """Exact curves of image scores, in blocks of resamplings; weights of shape (B, n)."""
    for start in range(0, len(weights), _BLOCK):
        yield trace_curve(scores, labels, weights[start : start + _BLOCK].astype(np.int64))


def resample_pixels(
    counts: ImageCounts, anomalous: AnomalousPixels, weights: Weights
) -> Iterator[Curve]:
    """Curves of pixels, in blocks of resamplings: a matrix product with each image's counts.

    Exact with at most 2048 distinct anomalous scores. Otherwise each curve is known at 1023 or more
    even steps of recall and of overlap, between which normal and anomalous pixels are taken as
    evenly mixed; this moves a metric by less than 1e-3.

    Both counts are of the same n images; weights say how often each was drawn, shape (B, n).
    """
    images, edges = counts.normal.shape
    step = edges - np.searchsorted(counts.edge[::-1], anomalous.score, side="right")
    place = anomalous.image[anomalous.region]

    @lru_cache(maxsize=1)
    def cumulate(first: int) -> tuple[Floats, Floats, Floats]:
        """Anomalous and normal pixels and overlap at each edge, of a block of images, (m, E)."""
        normal = counts.normal[first : first + _IMAGES].astype(np.float64)
        inside = (place >= first) & (place < first + _IMAGES)
        cell = (place[inside] - first) * edges + step[inside]
        pixels = np.bincount(cell, minlength=normal.size).reshape(normal.shape)
        weight = anomalous.weight[inside]
        found = np.bincount(cell, weights=weight, minlength=normal.size).reshape(normal.shape)
        overlap = np.rint(np.cumsum(found, axis=1) / _OVERLAP_STEP) * _OVERLAP_STEP
        return np.cumsum(pixels, axis=1).astype(np.float64), normal, overlap

    # many images are counted once, for all resamplings; the sums are exact in any order
    together = _BLOCK if images <= _IMAGES else len(weights)
    for start in range(0, len(weights), together):
        drawn = weights[start : start + together]
        sums = np.zeros((3, len(drawn), edges))
        for first in range(0, images, _IMAGES):
            part = drawn[:, first : first + _IMAGES].astype(np.float64)  # (b, m)
            for total, values in zip(sums, cumulate(first), strict=True):
                total += part @ values
        negatives = drawn @ counts.normals
        for block in range(0, len(drawn), _BLOCK):
            rows = slice(block, block + _BLOCK)
            tp, fp, overlap = sums[:, rows]
            yield _trace_sums(counts.edge, tp, fp, overlap, negatives[rows])


def _trace_sums(
    edge: npt.NDArray[np.float32], tp: Floats, fp: Floats, overlap: Floats, negatives: Floats
) -> Curve:
    """Curves of b resamplings from their sums at each edge, shape (b, E)."""
    regions = overlap[:, -1:]  # at the lowest edge every region is found as a whole
    undefined = np.full_like(overlap, np.nan)
    return Curve(
        threshold=edge,
        tp=tp,
        fp=fp,
        fp_above=previous(fp),
        positives=tp[:, -1],
        negatives=negatives,
        overlap=np.divide(overlap, regions, out=undefined, where=regions > 0),
    )
