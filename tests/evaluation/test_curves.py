"""Ranking metrics against scikit-learn's and against answers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from almrr_pipeline.evaluation.curves import (
    CURVE_POINTS,
    auroc,
    average_precision,
    best_f1_threshold,
    f1_max,
    tabulate_curves,
    thin,
    trace_curve,
)

TIED_SCORES = st.lists(
    st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60
).filter(lambda units: len({label for _, label in units}) == 2)


def best_f1(labels: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300)))


@settings(deadline=None, max_examples=100)
@given(TIED_SCORES)
def test_metrics_equal_scikit_learn_with_many_ties(units: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([s / 4 for s, _ in units]), np.array([label for _, label in units])
    curve = trace_curve(scores, labels)
    assert auroc(curve) == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert average_precision(curve) == pytest.approx(
        average_precision_score(labels, scores), abs=1e-9
    )
    assert f1_max(curve) == pytest.approx(best_f1(labels, scores), abs=1e-9)


def test_auroc_counts_a_tie_half() -> None:
    # defective 3 and 1, normal 2 and 1: pairs won 3>2, 3>1, lost 1<2, tied 1=1: 2.5 of 4
    assert (
        auroc(trace_curve(np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False])))
        == 2.5 / 4
    )


def test_average_precision_by_hand() -> None:
    # alarms in order: positive, negative, positive: precision 1 at recall 1/2, 2/3 at recall 1
    curve = trace_curve(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]))
    assert average_precision(curve) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_best_f1_and_its_threshold_by_hand() -> None:
    # at 1: two hits, one false alarm, none missed: F1 = 2 * 2 / (2 + 1 + 2); at 3: 2 / (1 + 2)
    curve = trace_curve(np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, False, True, False]))
    assert f1_max(curve) == pytest.approx(0.8)
    assert best_f1_threshold(curve) == 1.0


def test_a_weight_counts_as_so_many_copies() -> None:
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 5, 30).astype(float), np.arange(30) % 3 == 0
    weights = generator.integers(0, 4, (3, 30))
    weighted = trace_curve(scores, labels, weights)
    copies = [trace_curve(np.repeat(scores, row), np.repeat(labels, row)) for row in weights]
    for metric in (auroc, average_precision, f1_max):
        np.testing.assert_allclose(metric(weighted), [metric(copy) for copy in copies], rtol=1e-12)


def test_metrics_of_a_resampling_without_normal_units_are_nan() -> None:
    curve = trace_curve(np.array([1.0, 2.0]), np.array([True, False]), np.array([[1, 0]]))
    assert np.isnan(auroc(curve)).all()


def test_roc_table_of_few_units_is_scikit_learns_curve() -> None:
    generator = np.random.default_rng(1)
    labels = generator.random(50) < 0.4
    scores = np.round(generator.random(50) + 0.3 * labels, 1)
    table = tabulate_curves(trace_curve(scores, labels))["roc"]
    fpr, tpr, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    wanted = {(round(x, 12), round(y, 12)) for x, y in zip(fpr, tpr, strict=True)}
    found = {(round(x, 12), round(y, 12)) for x, y in zip(table["fpr"], table["tpr"], strict=True)}
    assert wanted <= found  # the table adds the corners just above each threshold
    for threshold, x, y in zip(thresholds[1:], fpr[1:], tpr[1:], strict=True):
        alarms = scores >= threshold
        assert (x, y) == (alarms[~labels].mean(), alarms[labels].mean())


def test_thresholds_of_the_tables_reproduce_their_points() -> None:
    generator = np.random.default_rng(2)
    labels = generator.random(400) < 0.3
    scores = np.round(generator.random(400) + 0.3 * labels, 2)
    curve = trace_curve(scores, labels)
    for _, row in tabulate_curves(curve)["roc"].dropna().iterrows():
        alarms = scores >= row["threshold"]
        assert (row["fpr"], row["tpr"]) == (alarms[~labels].mean(), alarms[labels].mean())
    for _, row in tabulate_curves(curve)["pr"].dropna().iterrows():
        alarms = scores >= row["threshold"]
        assert row["recall"] == alarms[labels].mean()
        assert row["precision"] == (labels[alarms].mean() if alarms.any() else 1.0)


def test_curves_start_without_alarms_and_end_with_all() -> None:
    curve = trace_curve(np.array([1.0, 3.0, 2.0]), np.array([True, False, False]))
    tables = tabulate_curves(curve)
    roc, pr = tables["roc"], tables["pr"]
    assert roc[["fpr", "tpr"]].iloc[[0, -1]].to_numpy().tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert pr[["recall", "precision"]].iloc[[0, -1]].to_numpy().tolist() == [
        [0.0, 1.0],
        [1.0, 1 / 3],
    ]


def test_thinned_roc_keeps_its_shape() -> None:
    generator = np.random.default_rng(3)
    labels = generator.random(30_000) < 0.2
    scores = generator.normal(size=30_000) + labels
    table = tabulate_curves(trace_curve(scores, labels))["roc"]
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert 900 < len(table) <= CURVE_POINTS
    assert np.abs(np.interp(fpr, table["fpr"], table["tpr"]) - tpr).max() < 0.004


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=300), st.integers(3, 50))
def test_thinning_keeps_both_ends_and_never_exceeds_the_points(
    values: list[float], points: int
) -> None:
    x = np.sort(np.array(values))
    chosen = thin(x, x**2, points)
    assert len(chosen) <= max(points, 3)
    assert chosen[0] == 0
    assert chosen[-1] == len(x) - 1
    assert (np.diff(chosen) > 0).all()
