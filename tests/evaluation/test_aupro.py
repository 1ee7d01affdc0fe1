"""Per-region overlap against answers worked by hand and a slow, literal second implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almrr_pipeline.config import EvaluateSettings
from almrr_pipeline.evaluation.curves import Curve, aupro, name_aupro, tabulate_curves
from almrr_pipeline.evaluation.evaluate import evaluate
from almrr_pipeline.evaluation.pixels import label_regions


def measure_aupro(maps: list[np.ndarray], masks: list[np.ndarray], limit: float) -> float:
    labels = [bool(mask.any()) for mask in masks]
    found = evaluate(
        maps,
        masks,
        [0.0] * len(maps),
        labels,
        ["hole" if label else "good" for label in labels],
        EvaluateSettings.model_construct(aupro_limits=(limit,), bootstrap=0),
        thresholds=(None, None),
    )
    return found.metrics[name_aupro(limit)]


def test_regions_that_touch_at_a_corner_are_one() -> None:
    labeled, count = label_regions(
        np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=bool)
    )
    assert count == 3
    assert labeled[0, 0] == labeled[1, 1] != labeled[0, 3]


def test_a_small_region_counts_as_much_as_a_large_one() -> None:
    # Regions of 1 and 4 pixels, 7 normal pixels. Found first, without a false alarm: the small
    # region (PRO 1/2). Then two normal pixels (FPR 2/7), then the large region. Up to 2/7 the
    # curve, and its normalized area, are 1/2;
    mask = np.array([[1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=bool)
    values = np.array([[9, 8, 5, 5], [8, 1, 5, 5], [1, 1, 1, 1]], dtype=np.float32)
    assert measure_aupro([values], [mask], 2 / 7) == pytest.approx(0.5)
    # up to 4/7, half the way at 1/2 and half at 1.
    assert measure_aupro([values], [mask], 4 / 7) == pytest.approx(0.75)


def test_a_piece_with_ties_is_cut_at_the_limit_by_linear_interpolation() -> None:
    # one region of 2 pixels, 4 normal pixels, all tied: the curve is the line (0, 0) to (1, 1);
    # its area up to 0.3 is 0.3^2 / 2, normalized 0.15
    mask = np.array([[1, 1, 0], [0, 0, 0]], dtype=bool)
    assert measure_aupro([np.ones((2, 3), np.float32)], [mask], 0.3) == pytest.approx(0.15)


def test_normal_pixels_below_every_defective_one_leave_it_perfect() -> None:
    mask = np.array([[1, 0, 0, 0]], dtype=bool)
    assert measure_aupro([np.array([[0.9, 0.1, 0.2, 0.3]], np.float32)], [mask], 0.5) == 1.0


def test_a_map_that_finds_the_defect_last_has_none() -> None:
    mask = np.array([[1, 0, 0, 0]], dtype=bool)
    assert measure_aupro([np.array([[0.0, 0.1, 0.2, 0.3]], np.float32)], [mask], 0.3) == 0.0


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("decimals", [1, 2, 8])
def test_equals_the_literal_definition(
    draw_case: Callable[..., Any], literal_aupro: Callable[..., float], decimals: int, limit: float
) -> None:
    case = draw_case(decimals, normal=1, defective=2, decimals=decimals, side=16)
    found = measure_aupro(case.maps, case.masks, limit)
    assert found == pytest.approx(literal_aupro(case.maps, case.masks, limit), abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=24, max_size=24).filter(
        lambda pixels: {True, False} == {defective for _, defective in pixels}
    ),
    st.floats(0.01, 1.0),
)
def test_equals_the_literal_definition_with_many_ties(
    literal_aupro: Callable[..., float], pixels: list[tuple[int, bool]], limit: float
) -> None:
    values = np.array([value for value, _ in pixels], np.float32).reshape(4, 6)
    mask = np.array([defective for _, defective in pixels]).reshape(4, 6)
    assert measure_aupro([values], [mask], limit) == pytest.approx(
        literal_aupro([values], [mask], limit), abs=1e-6
    )


def test_is_nan_where_no_normal_pixel_was_drawn() -> None:
    counts = np.array([[1.0]])
    curve = Curve(
        np.ones(1), counts, 0 * counts, 0 * counts, counts[:, 0], 0 * counts[:, 0], overlap=counts
    )
    assert np.isnan(aupro(curve, 0.3)).all()


def test_the_table_ends_at_the_limit_and_has_the_area_of_the_metric(case: Any) -> None:
    found = case.evaluate(aupro_limits=(0.2,))
    table = found.curves["pro"]
    assert table["fpr"].iloc[0] == 0.0
    assert table["fpr"].iloc[-1] == 0.2
    area = np.trapezoid(table["pro"], table["fpr"]) / 0.2
    assert area == pytest.approx(found.metrics["aupro_20"], abs=1e-9)


def test_the_table_is_cut_between_two_corners() -> None:
    # one threshold, 4 normal pixels and one region: the straight line to (1, 1)
    one, four = np.array([1]), np.array([4])
    curve = Curve(np.ones(1), one, four, 0 * four, np.asarray(1), np.asarray(4), overlap=np.ones(1))
    assert tabulate_curves(curve, 0.25)["pro"].to_numpy().tolist() == [[0.0, 0.0], [0.25, 0.25]]


@pytest.mark.parametrize(
    ("limit", "name"),
    [(0.3, "aupro_30"), (0.05, "aupro_05"), (1.0, "aupro_100"), (0.125, "aupro_12_5")],
)
def test_the_name_says_the_limit(limit: float, name: str) -> None:
    assert name_aupro(limit) == name
