"""Resampling images: strata kept, binned counts true to the exact ones, intervals that cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from almrr_pipeline.evaluation import bootstrap
from almrr_pipeline.evaluation.bootstrap import (
    draw_weights,
    percentile_interval,
    resample_images,
    resample_pixels,
)
from almrr_pipeline.evaluation.curves import aupro, auroc, average_precision, f1_max
from almrr_pipeline.evaluation.pixels import (
    ImageCounts,
    LabeledMaps,
    choose_edges,
    count_normal,
    gather_anomalous,
)


def measure_resampled(case: Any, weights: np.ndarray) -> dict[str, np.ndarray]:
    images = LabeledMaps(case.maps, case.masks, case.labels)
    anomalous, known = gather_anomalous(images)
    assert known.all()
    thresholds = anomalous.score[anomalous.last_of_score()]
    counts = ImageCounts.empty(choose_edges(anomalous, threshold=None), len(case.maps))
    count_normal(images, known, thresholds, counts)
    (curve,) = resample_pixels(counts, anomalous, weights)
    return {
        "pixel_auroc": auroc(curve),
        "pixel_ap": average_precision(curve),
        "pixel_f1max": f1_max(curve),
        "aupro_30": aupro(curve, 0.3),
        "aupro_05": aupro(curve, 0.05),
    }


def test_every_resampling_keeps_the_strata() -> None:
    labels = np.arange(12) < 5
    weights = draw_weights(labels, 200, np.random.default_rng(0))
    assert (weights[:, labels].sum(axis=1) == 5).all()
    assert (weights[:, ~labels].sum(axis=1) == 7).all()
    assert weights.std() > 0


def test_blocks_of_images_or_resamplings_change_no_digit(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = case.evaluate(bootstrap=50, seed=3).metrics["intervals"]
    monkeypatch.setattr(bootstrap, "_IMAGES", 3)
    assert len(case.maps) > 3
    assert case.evaluate(bootstrap=50, seed=3).metrics["intervals"] == whole
    monkeypatch.setattr(bootstrap, "_BLOCK", 8)
    assert case.evaluate(bootstrap=50, seed=3).metrics["intervals"] == whole


def test_each_image_is_drawn_once_on_average() -> None:
    weights = draw_weights(np.arange(10) < 5, 4000, np.random.default_rng(0))
    np.testing.assert_allclose(weights.mean(axis=0), 1.0, atol=0.1)


def test_a_set_without_normal_images_is_resampled_too() -> None:
    weights = draw_weights(np.ones(6, bool), 10, np.random.default_rng(0))
    assert (weights.sum(axis=1) == 6).all()


def test_the_same_seed_gives_the_same_intervals(case: Any) -> None:
    first, second = (case.evaluate(bootstrap=50, seed=3).metrics["intervals"] for _ in range(2))
    assert first == second
    assert first != case.evaluate(bootstrap=50, seed=4).metrics["intervals"]


def test_counts_at_the_edges_lose_nothing_where_scores_are_few(case: Any) -> None:
    once = measure_resampled(case, np.ones((1, len(case.maps)), int))
    exact = case.evaluate().metrics
    for name, values in once.items():
        assert values[0] == pytest.approx(exact[name], abs=1e-9), name


def test_counts_at_the_edges_are_close_where_scores_are_many(draw_case: Callable[..., Any]) -> None:
    case = draw_case(5, normal=20, defective=60, decimals=8, side=120, extent=50)
    labels, scores = case.pixels
    assert len(np.unique(scores[labels])) > 20_000
    once = measure_resampled(case, np.ones((1, len(case.maps)), int))
    exact = case.evaluate().metrics
    for name, values in once.items():
        assert values[0] == pytest.approx(exact[name], abs=1e-3), name


@pytest.mark.parametrize("decimals", [2, 8])
def test_a_resampling_is_the_test_set_with_images_repeated(
    draw_case: Callable[..., Any], decimals: int
) -> None:
    case = draw_case(6, decimals=decimals)
    weights = draw_weights(case.labels, 3, np.random.default_rng(0))
    resampled = measure_resampled(case, weights)
    for row, drawn in enumerate(weights):
        chosen = np.repeat(np.arange(len(case.maps)), drawn)
        parts = (case.maps, case.masks, case.defect_types, case.scores)
        repeated = type(case)(*([part[i] for i in chosen] for part in parts))
        exact = repeated.evaluate().metrics
        for name, values in resampled.items():
            assert values[row] == pytest.approx(exact[name], abs=1e-9 if decimals == 2 else 1e-3), (
                name
            )


def test_blocks_of_resamplings_follow_one_another(case: Any) -> None:
    weights = draw_weights(case.labels, 150, np.random.default_rng(0))
    curves = list(resample_images(np.array(case.scores), case.labels, weights))
    assert [len(curve.tp) for curve in curves] == [64, 64, 22]
    (last,) = resample_images(np.array(case.scores), case.labels, weights[128:])
    np.testing.assert_array_equal(auroc(curves[2]), auroc(last))


def test_the_interval_ignores_resamplings_that_leave_the_metric_undefined() -> None:
    assert percentile_interval([np.nan, *np.linspace(0, 1, 101)]) == pytest.approx((0.025, 0.975))


def test_intervals_of_a_known_distribution_cover_it() -> None:
    # defective scores are normal ones shifted by 1.5: the true AUROC is Phi(1.5 / sqrt 2) = 0.8556
    generator = np.random.default_rng(0)
    labels = np.arange(120) < 60
    covered = 0
    for _ in range(100):
        scores = generator.normal(size=120) + 1.5 * labels
        weights = draw_weights(labels, 200, generator)
        low, high = percentile_interval(
            np.concatenate([auroc(c) for c in resample_images(scores, labels, weights)])
        )
        covered += low <= 0.85556 <= high
    assert covered >= 88  # 95 % of 100 less three standard deviations


def test_resamplings_that_draw_no_anomalous_pixel_do_not_count(
    draw_case: Callable[..., Any],
) -> None:
    case = draw_case(0, normal=3, defective=3)
    case.masks[4][:] = case.masks[5][:] = False
    only_empty_masks = np.array([[1, 1, 1, 0, 2, 1], [1, 1, 1, 1, 1, 1]])
    for name, values in measure_resampled(case, only_empty_masks).items():
        assert np.isnan(values[0]), name
        assert 0.0 < values[1] < 1.0, name
