"""Means over seeds and categories, stds over seeds; undefined metrics left out."""

from __future__ import annotations

import numpy as np
import pytest

from almrr_pipeline.evaluation.summary import summarize


def test_means_leave_out_categories_without_the_metric() -> None:
    brick, nano = {"image_auroc": 0.5, "pixel_ap": 0.2}, {"image_auroc": None, "pixel_ap": 0.4}
    found = summarize({"brick": {0: brick}, "nano": {0: nano}})
    assert found["mean"] == {"image_auroc": 0.5, "pixel_ap": pytest.approx(0.3)}
    assert found["categories"] == {"brick": brick, "nano": nano}


def test_a_metric_that_no_category_defines_has_no_mean() -> None:
    assert summarize({"nano": {0: {"image_auroc": None}}})["mean"] == {"image_auroc": None}


def test_only_metrics_are_averaged() -> None:
    metrics = {
        "pixel_ap": 0.5,
        "counts": {"images": 3},
        "undefined": {},
        "oracle_image_threshold": 0.7,
    }
    found = summarize({"brick": {0: metrics}})
    assert found["mean"] == {"pixel_ap": 0.5}
    assert found["runs"] == {"brick": {"0": {"pixel_ap": 0.5}}}


def test_a_metric_that_only_some_categories_have_is_averaged_over_those() -> None:
    found = summarize({"a": {0: {"aupro_30": 0.5}}, "b": {0: {"aupro_10": 0.1}}})
    assert found["mean"] == {"aupro_30": 0.5, "aupro_10": 0.1}


def test_seeds_of_a_category_become_mean_and_std() -> None:
    grid = {0: {"pixel_ap": 0.1}, 1: {"pixel_ap": 0.3}, 12: {"pixel_ap": 0.5}}
    found = summarize({"grid": grid, "wood": {0: {"pixel_ap": 0.9}}})
    assert found["categories"]["grid"]["pixel_ap"] == pytest.approx(0.3)
    assert found["std"]["grid"]["pixel_ap"] == pytest.approx(np.std([0.1, 0.3, 0.5], ddof=1))
    assert found["categories"]["wood"]["pixel_ap"] == 0.9
    assert list(found["std"]) == ["grid"]
    assert list(found["runs"]["grid"]) == ["0", "1", "12"]


def test_seeds_that_leave_a_metric_undefined_are_left_out() -> None:
    found = summarize({"x": {0: {"image_auroc": None}, 1: {"image_auroc": 0.8}}})
    assert found["categories"]["x"]["image_auroc"] == 0.8
    assert found["std"]["x"]["image_auroc"] is None


def test_each_category_counts_alike_however_many_seeds_it_has() -> None:
    grid = {0: {"pixel_ap": 0.1}, 1: {"pixel_ap": 0.3}, 2: {"pixel_ap": 0.5}}
    found = summarize({"grid": grid, "wood": {0: {"pixel_ap": 0.9}}})
    assert found["mean"]["pixel_ap"] == pytest.approx(0.6)
    assert found["runs"]["grid"]["2"] == {"pixel_ap": 0.5}
