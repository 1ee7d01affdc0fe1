"""Counts of pixels: exact over many images, chunks and sizes; clear errors."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import EvaluateSettings
from almrr_pipeline.evaluation.evaluate import evaluate
from almrr_pipeline.evaluation.pixels import (
    AnomalousPixels,
    LabeledMaps,
    choose_edges,
    count_reaching,
    gather_anomalous,
    just_above,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def anomalous_pixels(scores: np.ndarray) -> AnomalousPixels:
    """Pixels of one image's only region."""
    count = len(scores)
    ranked = np.sort(scores.astype(np.float32))[::-1]
    return AnomalousPixels(ranked, np.zeros(count, np.uint32), np.array([count]), np.array([0]))


@settings(deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=FINITE))
def test_anomalous_pixels_come_by_falling_score_whatever_their_sign(values: np.ndarray) -> None:
    images = LabeledMaps([values], [np.ones(values.shape, bool)], np.array([True]))
    anomalous, known = gather_anomalous(images)
    np.testing.assert_array_equal(anomalous.score, np.sort(values.ravel())[::-1])
    assert known.tolist() == [True]


def test_minus_zero_is_zero() -> None:
    values = np.array([[-0.0, 0.0, 0.0]], np.float32)
    anomalous, _ = gather_anomalous(
        LabeledMaps([values], [np.ones((1, 3), bool)], np.array([True]))
    )
    assert anomalous.last_of_score().tolist() == [2]


def test_each_pixel_weighs_one_over_its_region() -> None:
    mask = np.array([[1, 1, 0, 1]], dtype=bool)
    values = np.array([[0.1, 0.9, 0.5, 0.4]], np.float32)
    anomalous, _ = gather_anomalous(LabeledMaps([values], [mask], np.array([True])))
    assert anomalous.score.tolist() == pytest.approx([0.9, 0.4, 0.1])
    assert anomalous.weight.tolist() == [0.5, 1.0, 0.5]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=6), st.sets(st.integers(0, 9)))
def test_normal_pixels_are_counted_exactly_over_many_images(
    parts: list[list[int]], thresholds: set[int]
) -> None:
    falling = np.array(sorted(thresholds, reverse=True), np.float32)
    everything = np.array([value for part in parts for value in part], np.float32)
    reaching, above = count_reaching(falling, [np.array(part, np.float32) for part in parts])
    assert reaching[-1] == above[-1] == len(everything)
    assert reaching[:-1].tolist() == [(everything >= threshold).sum() for threshold in falling]
    assert above[:-1].tolist() == [(everything > threshold).sum() for threshold in falling]


def test_edges_are_all_scores_where_these_are_few() -> None:
    edges = choose_edges(anomalous_pixels(np.array([0.5, 0.25, 0.5])), threshold=None)
    up = np.nextafter(np.float32([0.5, 0.25]), np.float32(1))
    assert edges.tolist() == [up[0], 0.5, up[1], 0.25]


def test_edges_split_many_pixels_evenly() -> None:
    scores = np.random.default_rng(0).random(50_000).astype(np.float32)
    edges = choose_edges(anomalous_pixels(scores), threshold=0.3)
    assert len(edges) <= 4097
    assert (np.diff(edges) < 0).all()
    reaching = len(scores) - np.searchsorted(np.sort(scores), edges)
    assert np.diff(reaching).max() <= 50_000 / 1023 + 1
    assert reaching[-1] == 50_000


@settings(deadline=None)
@given(FINITE.filter(lambda value: abs(value) < 1e30), st.floats(-1e30, 1e30))
def test_just_above_turns_a_strict_comparison_into_a_weak_one(
    score: float, threshold: float
) -> None:
    assert (np.float32(score) >= just_above(threshold)) == (float(np.float32(score)) > threshold)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_is_refused(case: Any, value: float) -> None:
    case.maps[2][0, 0] = value
    with pytest.raises(AlmrrError, match="test image 2 has values that are not finite"):
        case.evaluate()


def test_a_mask_of_another_shape_is_refused(case: Any) -> None:
    case.masks[5] = case.masks[5][:-1]
    with pytest.raises(AlmrrError, match=r"Test image 5: .* the mask .*; resize"):
        case.evaluate()


def test_a_map_with_channels_is_refused(case: Any) -> None:
    case.maps[0] = case.maps[0][None]
    with pytest.raises(AlmrrError, match="test image 0 has the shape"):
        case.evaluate()


def test_a_normal_image_with_anomalous_pixels_is_refused(case: Any) -> None:
    case.masks[1][3, 3] = True
    with pytest.raises(AlmrrError, match="image 1 is labeled normal, but"):
        case.evaluate()


class Drawn:
    """Maps or masks that exist only while they are looked at."""

    def __init__(self, count: int, *, masks: bool) -> None:
        self.count, self.masks = count, masks

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if self.masks:
            mask = np.zeros((256, 256), bool)
            mask[10:14, 10:14] = index % 2 == 1
            return mask
        return np.random.default_rng(index).random((256, 256), dtype=np.float32)


def trace_peak(count: int) -> int:
    """Highest number of bytes in use while a test set of so many images is evaluated."""
    labels = np.arange(count) % 2 == 1
    tracemalloc.start()
    try:
        evaluate(
            Drawn(count, masks=False),
            Drawn(count, masks=True),
            labels,
            labels,
            ["dent"] * count,
            EvaluateSettings(bootstrap=0),
            thresholds=(None, None),
        )
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_maps() -> None:
    trace_peak(4)  # what is imported and cached at first use does not count
    few, many = trace_peak(20), trace_peak(120)
    assert many - few < 0.15 * 100 * 256 * 256 * 4
