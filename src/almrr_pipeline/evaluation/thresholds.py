"""Decision thresholds with a guaranteed false-alarm rate, from normal validation images.

Split conformal prediction (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World",
2005; Lei et al., JASA 2018): if the n validation scores and the score of a new normal image are
exchangeable, the new one exceeds the k-th smallest of the n with a probability of at most
1 - k / (n + 1), whatever the distribution of the scores. No test image takes part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import scipy.stats

from almrr_pipeline.common.arrays import Bools, Floats
from almrr_pipeline.common.errors import AlmrrError

_UNLIKELY = 0.001  # probability below which a number of alarms is no chance


@dataclass(frozen=True)
class Threshold:
    """Decision threshold: an image or pixel is anomalous where `score > value`.

    Too few images guarantee a larger rate than the requested one. `guarantee` and `undefined`, why
    there is no value, are sentences.
    """

    value: float | None  # None if there was no validation image
    rate: float  # the requested false-alarm rate, in (0, 1)
    normals: int  # number of validation images
    guaranteed_rate: float | None  # None if nothing is guaranteed
    guarantee: str
    undefined: str | None = None


@dataclass(frozen=True)
class Proportion:
    """Fraction with its exact 95 % interval (Clopper and Pearson, 1934); None if `of` is 0."""

    rate: float | None
    count: int
    of: int
    low: float | None
    high: float | None


def conformal_threshold(
    scores: npt.ArrayLike, rate: float, *, event: str = "is called defective though it is normal"
) -> Threshold:
    """Threshold from validation images: their ceil((n + 1)(1 - rate))-th smallest score.

    If n is too small for that rank, no finite threshold keeps the rate: the largest score is taken,
    and the guaranteed rate is 1 / (n + 1).

    For outlines the scores are the maxima of the anomaly maps, as images are exchangeable, but
    pixels of different images are not: the guarantee is that a normal image shows no outline.

    Args:
        scores: of the validation images, shape (n,); n may be 0. AlmrrError if one is not finite.
        rate: the false-alarm rate to keep, in (0, 1); AlmrrError otherwise.
        event: what a false alarm is, for the sentence.
    """
    ranked = np.sort(np.asarray(scores, dtype=np.float64).reshape(-1))
    if not 0.0 < rate < 1.0:
        raise AlmrrError(
            f"The false-alarm rate is {rate}; choose one between 0 and 1, such as 0.05."
        )
    if not np.isfinite(ranked).all():
        raise AlmrrError(
            "A score of a normal validation image is not finite; the model's weights are broken, "
            "train again."
        )
    count = len(ranked)
    if count == 0:
        reason = (
            "no normal image was held out (data.validation_fraction is 0, or there was one "
            "training image)"
        )
        return Threshold(None, rate, 0, None, f"Nothing is guaranteed: {reason}.", reason)
    exact_rate = Fraction(str(rate))  # 20 x 0.05 is 1 exactly
    rank = min(count + 1 - int((count + 1) * exact_rate), count)
    guaranteed = (count + 1 - rank) / (count + 1)
    guarantee = (
        f"A new image from the same process {event} with a probability of at most "
        f"{guaranteed:.2%}, averaged over the choice of the {_count_images(count)}"
    )
    if guaranteed > rate:
        needed = math.ceil((1 - exact_rate) / exact_rate)
        guarantee += (
            f"; the requested {rate:.2%} would need at least {needed} of them, so the largest "
            "score was taken"
        )
    return Threshold(float(ranked[rank - 1]), rate, count, guaranteed, guarantee + ".")


def alarm_p_value(threshold: Threshold | None, alarms: int, images: int) -> float | None:
    """Probability of so many alarms or more, were the images normal and of the same process.

    The number of alarms among new images that are exchangeable with the n of the calibration has a
    beta-binomial distribution, whatever that of the scores; with ties they are fewer.

    Returns:
        In [0, 1]; None where nothing is guaranteed.
    """
    if threshold is None or threshold.guaranteed_rate is None:
        return None
    above = threshold.guaranteed_rate * (threshold.normals + 1)  # ranks of a new score: alarms
    below = threshold.normals + 1 - above
    return float(scipy.stats.betabinom.sf(alarms - 1, images, above, below))


def describe_alarms(threshold: Threshold | None, alarms: int, images: int) -> list[str]:
    """A sentence where there are more alarms than the guarantee leaves likely, or nothing."""
    p_value = alarm_p_value(threshold, alarms, images)
    if threshold is None or p_value is None or p_value > _UNLIKELY:
        return []
    return [
        f"{alarms} alarms of {images} are more than the {threshold.guaranteed_rate:.1%} that the "
        f"threshold promises of normal images (p = {p_value:.1g}): defects, or images unlike those "
        "of the calibration; look at them."
    ]


def find_fault(threshold: Threshold) -> str | None:
    """Name a number of a stored threshold that is out of its range, or return None."""
    ranges = {
        "value": (threshold.value, 0.0, 1.0),
        "rate": (threshold.rate, 0.0, 1.0),
        "guaranteed_rate": (threshold.guaranteed_rate, 0.0, 1.0),
        "normals": (threshold.normals, 0, math.inf),
    }
    for name, (number, low, high) in ranges.items():
        if number is not None and not low <= number <= high:  # nan is in no range
            return f"{name} is {number}, not between {low:g} and {high:g}"
    return None


def withdraw_guarantee(threshold: Threshold) -> Threshold:
    """Same threshold without a guarantee, for a model that was selected on the validation images.

    Their scores and that of a new normal image are then no longer exchangeable.
    """
    if threshold.value is None:
        return threshold
    guarantee = (
        "Nothing is guaranteed: the weights were selected on the "
        f"{_count_images(threshold.normals)} that the threshold was taken from (train.selection is "
        "validation)."
    )
    return replace(threshold, guaranteed_rate=None, guarantee=guarantee)


def rates_at(scores: Floats, labels: Bools, threshold: float) -> dict[str, Proportion]:
    """Rates of `score > threshold`: false_alarms and detections; labels True where defective."""
    alarms = scores > threshold
    return {"false_alarms": proportion(alarms[~labels]), "detections": proportion(alarms[labels])}


def proportion(hits: Bools) -> Proportion:
    """Fraction of True with its Clopper-Pearson 95 % interval; shape (n,)."""
    count, of = int(hits.sum()), len(hits)
    if of == 0:
        return Proportion(None, 0, 0, None, None)
    interval = scipy.stats.binomtest(count, of).proportion_ci(confidence_level=0.95, method="exact")
    return Proportion(count / of, count, of, float(interval.low), float(interval.high))


def _count_images(normals: int) -> str:
    return f"{normals} normal validation image" + ("" if normals == 1 else "s")
