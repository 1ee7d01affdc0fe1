"""Decision thresholds with a guaranteed false-alarm rate, from normal images that nothing was trained on.

Split conformal prediction (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005; Lei et al., JASA
2018): if the n held-out scores and the score of a new normal image are exchangeable, the new one is larger than the
k-th smallest of the n with a probability of at most 1 - k / (n + 1), whatever the scores' distribution. No test image
takes part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import scipy.stats

from almrr_pipeline.common.errors import AlmrrError


@dataclass(frozen=True)
class Threshold:
    """A level above which a decision is made: `score > value`.

    Attributes:
        value: the level; None if there was no image to take it from.
        rate: the false-alarm rate that was asked for, in (0, 1).
        normals: validation images it was taken from.
        guaranteed_rate: the rate that these images can guarantee; larger than `rate` if they are too few; None if
            they guarantee none.
        guarantee: what the threshold promises, as a sentence.
        undefined: why there is no value; None if there is one.
    """

    value: float | None
    rate: float
    normals: int
    guaranteed_rate: float | None
    guarantee: str
    undefined: str | None = None


@dataclass(frozen=True)
class Proportion:
    """A counted share with its exact 95 % interval (Clopper and Pearson, 1934); None where nothing was counted."""

    rate: float | None
    count: int
    of: int
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Rates:
    """What a threshold did on labeled images."""

    false_alarms: Proportion
    """Normal images above the threshold."""
    detections: Proportion
    """Defective images above the threshold."""


def conformal_threshold(
    scores: npt.ArrayLike, rate: float, *, event: str = "is called defective though it is normal"
) -> Threshold:
    """Take the threshold from validation images: the ceil((n + 1)(1 - rate))-th smallest score.

    Where n is too small for that rank to exist, no finite threshold keeps the rate: the largest score is taken, and the
    rate that n images can guarantee, 1 / (n + 1), is said.

    For outlines the scores are the maxima of the anomaly maps: pixels of different images are not exchangeable,
    images are, so that what is promised is that a normal image shows no outline at all.

    Args:
        scores: finite scores of the validation images, shape (n,); n may be 0.
        rate: the false-alarm rate to keep, in (0, 1).
        event: what a false alarm is, for the sentence.

    Raises:
        AlmrrError: a score is not finite, or the rate lies outside (0, 1).
    """
    ranked = np.sort(np.asarray(scores, dtype=np.float64).reshape(-1))
    if not 0.0 < rate < 1.0:
        raise AlmrrError(f"The false-alarm rate is {rate}; choose one between 0 and 1, such as 0.05.")
    if not np.isfinite(ranked).all():
        raise AlmrrError(
            "A score of a held-out normal image is not finite; the model's weights are broken, train again."
        )
    count = len(ranked)
    if count == 0:
        reason = "no normal image was held out (data.calibration is 0, or there was one training image)"
        return Threshold(None, rate, 0, None, f"Nothing is guaranteed: {reason}.", reason)
    exceeding = int((count + 1) * Fraction(str(rate)))  # n + 1 minus the rank; as a fraction, 20 x 0.05 is 1 exactly
    rank = min(count + 1 - exceeding, count)
    guaranteed = (count + 1 - rank) / (count + 1)
    return Threshold(float(ranked[rank - 1]), rate, count, guaranteed, _promise(count, rate, guaranteed, event))


def withdraw_guarantee(threshold: Threshold) -> Threshold:
    """The same level without a promise: the model was chosen on the very images that it was taken from.

    Their scores and that of a new normal image are then no longer exchangeable, which is what the promise rests on.
    """
    if threshold.value is None:
        return threshold
    images = "image" if threshold.normals == 1 else "images"
    guarantee = (
        f"Nothing is guaranteed: the weights were chosen on the {threshold.normals} held-out normal {images} that "
        "the threshold was taken from (train.selection is held_out)."
    )
    return replace(threshold, guaranteed_rate=None, guarantee=guarantee)


def rates_at(scores: npt.ArrayLike, labels: npt.ArrayLike, threshold: float) -> Rates:
    """Count what the decision `score > threshold` gives on labeled images.

    Args:
        scores: shape (n,).
        labels: True where defective, shape (n,).
        threshold: the level.
    """
    alarms, defective = np.asarray(scores) > threshold, np.asarray(labels, dtype=bool)
    return Rates(proportion(alarms[~defective]), proportion(alarms[defective]))


def proportion(hits: npt.NDArray[np.bool_]) -> Proportion:
    """Share of True with its Clopper-Pearson 95 % interval; shape (n,)."""
    count, of = int(hits.sum()), len(hits)
    if of == 0:
        return Proportion(None, 0, 0, None, None)
    interval = scipy.stats.binomtest(count, of).proportion_ci(confidence_level=0.95, method="exact")
    return Proportion(count / of, count, of, float(interval.low), float(interval.high))


def _promise(normals: int, rate: float, guaranteed: float, event: str) -> str:
    images = "image" if normals == 1 else "images"
    promise = (
        f"A new image from the same process {event} with a probability of at most {guaranteed:.2%}, "
        f"averaged over the choice of the {normals} held-out normal {images}"
    )
    if guaranteed <= rate:
        return promise + "."
    needed = -(-(1 - Fraction(str(rate))) // Fraction(str(rate)))
    return promise + f"; {rate:.2%} as asked for would need at least {needed} of them, so the largest score was taken."
