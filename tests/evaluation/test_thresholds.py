"""Conformal thresholds: rank, guarantee, and what is reported with too few images."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.evaluation.thresholds import (
    alarm_p_value,
    conformal_threshold,
    describe_alarms,
    proportion,
    rates_at,
    withdraw_guarantee,
)


@pytest.mark.parametrize(
    ("normals", "rate", "rank"),
    [
        (19, 0.05, 19),
        (20, 0.05, 20),
        (38, 0.05, 38),
        (39, 0.05, 38),
        (76, 0.05, 74),
        (99, 0.01, 99),
        (9, 0.3, 7),
    ],
)
def test_is_the_smallest_score_that_keeps_the_rate(normals: int, rate: float, rank: int) -> None:
    scores = np.random.default_rng(0).permutation(normals) + 1.0
    threshold = conformal_threshold(scores, rate)
    assert threshold.value == rank
    assert threshold.guaranteed_rate == pytest.approx((normals + 1 - rank) / (normals + 1))
    assert threshold.guaranteed_rate <= rate


@given(st.integers(1, 300), st.integers(1, 99))
def test_a_rank_lower_by_one_would_break_the_promise(normals: int, percent: int) -> None:
    threshold = conformal_threshold(np.arange(1.0, normals + 1), percent / 100)
    exceeding = normals + 1 - int(threshold.value)
    if exceeding * 100 <= percent * (normals + 1):
        assert (exceeding + 1) * 100 > percent * (normals + 1)
    else:
        assert (threshold.value, threshold.guaranteed_rate) == (normals, 1 / (normals + 1))


def test_too_few_images_take_the_largest_and_report_what_they_can_guarantee() -> None:
    threshold = conformal_threshold([0.2, 0.9, 0.4], 0.05)
    assert threshold.value == 0.9
    assert threshold.guaranteed_rate == 0.25
    assert "at most 25.00%" in threshold.guarantee
    assert "would need at least 19" in threshold.guarantee


def test_no_image_gives_no_threshold_and_a_reason() -> None:
    threshold = conformal_threshold([], 0.05)
    assert threshold.value is None
    assert threshold.guaranteed_rate is None
    assert "no normal image was held out" in threshold.undefined


def test_a_withdrawn_guarantee_leaves_the_value_and_says_why() -> None:
    threshold = conformal_threshold([0.2, 0.9, 0.4], 0.25)
    withdrawn = withdraw_guarantee(threshold)
    assert (withdrawn.value, withdrawn.rate, withdrawn.normals) == (0.9, 0.25, 3)
    assert withdrawn.guaranteed_rate is None
    assert withdrawn.guarantee.startswith(
        "Nothing is guaranteed: the weights were selected on the 3 normal validation images"
    )


def test_there_is_no_guarantee_to_withdraw_without_a_threshold() -> None:
    undefined = conformal_threshold([], 0.25)
    assert withdraw_guarantee(undefined) == undefined


@pytest.mark.parametrize("normals", [5, 20, 76])
@pytest.mark.parametrize("distinct", [10, 10**9], ids=["tied", "untied"])
def test_the_guarantee_holds_for_exchangeable_scores(normals: int, distinct: int) -> None:
    generator = np.random.default_rng(normals)
    alarms, trials = 0, 4000
    for _ in range(trials):
        offset = (
            generator.normal()
        )  # common to all images of a trial: exchangeable, not independent
        scores = np.round(
            offset + generator.exponential(size=normals + 1), 1 if distinct == 10 else 9
        )
        threshold = conformal_threshold(scores[:-1], 0.1)
        alarms += scores[-1] > threshold.value
    assert (
        scipy.stats.binomtest(
            alarms, trials, threshold.guaranteed_rate, alternative="greater"
        ).pvalue
        > 1e-3
    )


def test_the_guarantee_is_tight_without_ties() -> None:
    generator = np.random.default_rng(0)
    trials = 4000
    scores = generator.random((trials, 20))
    alarms = sum(row[-1] > conformal_threshold(row[:-1], 0.1).value for row in scores)
    assert scipy.stats.binomtest(alarms, trials, 0.1).pvalue > 1e-3


def test_a_score_at_the_threshold_is_no_alarm() -> None:
    rates = rates_at(np.array([0.5, 0.6, 0.5, 0.7]), np.array([False, False, True, True]), 0.5)
    assert (rates["false_alarms"].count, rates["false_alarms"].of) == (1, 2)
    assert (rates["detections"].count, rates["detections"].of) == (1, 2)


def test_proportion_carries_the_interval_of_clopper_and_pearson() -> None:
    fraction = proportion(np.arange(20) < 3)
    assert fraction.rate == 0.15
    assert fraction.low == pytest.approx(scipy.stats.beta.ppf(0.025, 3, 18))
    assert fraction.high == pytest.approx(scipy.stats.beta.ppf(0.975, 4, 17))


def test_proportion_of_nothing_is_undefined() -> None:
    fraction = rates_at(np.array([1.0]), np.array([True]), 0.5)["false_alarms"]
    assert (fraction.rate, fraction.of, fraction.low) == (None, 0, None)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    with pytest.raises(AlmrrError, match="between 0 and 1"):
        conformal_threshold([1.0], rate)


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(AlmrrError, match="not finite"):
        conformal_threshold([1.0, np.nan], 0.05)


def test_so_many_alarms_are_as_rare_as_they_are_in_simulation() -> None:
    """Of 39 normal images and 20 new ones, each time drawn anew."""
    generator = np.random.default_rng(0)
    scores = generator.random((4000, 59))
    thresholds = [conformal_threshold(row[:39], 0.05) for row in scores]
    pairs = zip(thresholds, scores, strict=True)
    alarms = np.array([(row[39:] > threshold.value).sum() for threshold, row in pairs])
    for count in (1, 2, 4):
        expected = alarm_p_value(thresholds[0], count, 20)
        assert (alarms >= count).mean() == pytest.approx(expected, abs=0.02)
    assert alarm_p_value(thresholds[0], 0, 20) == 1.0
    assert alarm_p_value(thresholds[0], 20, 20) < 1e-9
    assert describe_alarms(thresholds[0], 2, 20) == []
    assert describe_alarms(thresholds[0], 20, 20)[0].startswith(
        "20 alarms of 20 are more than the 5"
    )


def test_without_a_guarantee_no_number_of_alarms_is_too_large() -> None:
    withdrawn = withdraw_guarantee(conformal_threshold([0.2, 0.9, 0.4], 0.25))
    assert alarm_p_value(withdrawn, 3, 3) is None
    assert alarm_p_value(None, 3, 3) is None
