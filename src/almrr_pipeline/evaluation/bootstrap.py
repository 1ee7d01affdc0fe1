"""Confidence intervals by bootstrap over the test images, percentile method.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Images, not pixels, are
drawn with replacement, as the pixels of an image are not independent; normal and defective images
separately, so that each resampling has as many of both as the test set. The model is not trained
again: the intervals do not cover the variation between seeds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from almrr_pipeline.common.arrays import Bools, Floats, Indices
from almrr_pipeline.evaluation.curves import Curve, previous, trace_curve
from almrr_pipeline.evaluation.pixels import AnomalousPixels, ImageCounts

_BLOCK = 64
"""Resamplings that are evaluated together; bounds the memory."""
_OVERLAP_STEP = 2.0**-32
"""Overlaps are rounded to multiples of it, which add up without rounding: a matrix product then
does not depend on its order of summation."""


def draw_weights(labels: Bools, resamplings: int, generator: np.random.Generator) -> Indices:
    """Draw images with replacement, normal and defective ones (True in `labels`) separately.

    How often each of n images was drawn in each of B resamplings is returned, shape (B, n).
    """
    weights = np.zeros((resamplings, len(labels)), dtype=np.int64)
    for stratum in (~labels, labels):
        size = int(stratum.sum())
        if size:
            chances = np.full(size, 1.0 / size)
            weights[:, stratum] = generator.multinomial(size, chances, size=resamplings)
    return weights


def percentile_interval(values: npt.ArrayLike) -> tuple[float, float]:
    """Middle 95 % of a metric's resampled values, shape (B,); undefined ones (nan) do not count."""
    low, high = np.nanpercentile(np.asarray(values), [2.5, 97.5])
    return float(low), float(high)


def resample_images(scores: Floats, labels: Bools, weights: Indices) -> Iterator[Curve]:
    """Exact curves of image scores, in blocks of resamplings; weights of shape (B, n)."""
    for start in range(0, len(weights), _BLOCK):
        yield trace_curve(scores, labels, weights[start : start + _BLOCK])


def resample_pixels(
    counts: ImageCounts, anomalous: AnomalousPixels, weights: Indices
) -> Iterator[Curve]:
    """Curves of pixels, in blocks of resamplings: a matrix product with each image's counts.

    Exact with at most 2048 distinct anomalous scores. Otherwise each curve is known at 1023 or more
    even steps of recall and of overlap, between which normal and anomalous pixels are taken as
    evenly mixed; this moves a metric by less than 1e-3.

    Both counts are of the same n images; weights say how often each was drawn, shape (B, n).
    """
    shape = counts.normal.shape
    step = shape[1] - np.searchsorted(counts.edge[::-1], anomalous.score, side="right")
    cell = anomalous.image[anomalous.region] * shape[1] + step
    pixels = np.bincount(cell, minlength=counts.normal.size).reshape(shape)
    found = np.bincount(cell, weights=anomalous.weight, minlength=counts.normal.size).reshape(shape)
    tp_of_image = np.cumsum(pixels, axis=1).astype(np.float64)  # (n, E)
    overlap_of_image = np.rint(np.cumsum(found, axis=1) / _OVERLAP_STEP) * _OVERLAP_STEP  # (n, E)
    for start in range(0, len(weights), _BLOCK):
        drawn = weights[start : start + _BLOCK].astype(np.float64)  # (b, n)
        tp, fp = drawn @ tp_of_image, drawn @ counts.normal  # (b, E)
        overlap = drawn @ overlap_of_image  # (b, E)
        regions = overlap[:, -1:]  # at the lowest edge every region is found as a whole
        undefined = np.full_like(overlap, np.nan)
        yield Curve(
            threshold=counts.edge,
            tp=tp,
            fp=fp,
            fp_above=previous(fp),
            positives=tp[:, -1],
            negatives=drawn @ counts.normals,
            overlap=np.divide(overlap, regions, out=undefined, where=regions > 0),
        )
