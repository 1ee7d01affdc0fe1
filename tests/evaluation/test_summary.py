"""Means over categories and stds over seeds, with undefined metrics left out and counted."""

from __future__ import annotations

import numpy as np
import pytest

from almrr_pipeline.evaluation.summary import summarize, summarize_seeds


def test_means_leave_out_what_is_undefined_and_say_how_many_remain() -> None:
    found = summarize({"brick": {"image_auroc": 0.5, "pixel_ap": 0.2}, "nano": {"image_auroc": None, "pixel_ap": 0.4}})
    assert found["image_auroc"] == {"mean": 0.5, "categories": 1, "of": 2}
    assert found["pixel_ap"] == {"mean": pytest.approx(0.3), "categories": 2, "of": 2}


def test_a_metric_that_no_category_defines_has_no_mean() -> None:
    assert summarize({"nano": {"image_auroc": None}})["image_auroc"] == {"mean": None, "categories": 0, "of": 1}


def test_only_metrics_are_averaged() -> None:
    metrics = {"pixel_ap": 0.5, "counts": {"images": 3}, "undefined": {}, "oracle_image_threshold": 0.7}
    assert list(summarize({"brick": metrics})) == ["pixel_ap"]


def test_a_metric_that_only_some_categories_have_is_averaged_over_those() -> None:
    assert summarize({"a": {"aupro_30": 0.5}, "b": {"aupro_10": 0.1}})["aupro_10"]["categories"] == 1


def test_seeds_of_a_category_become_mean_and_std() -> None:
    runs = {"grid_seed0": {"pixel_ap": 0.1}, "grid_seed1": {"pixel_ap": 0.3}, "grid_seed12": {"pixel_ap": 0.5}}
    found = summarize_seeds(runs | {"wood": {"pixel_ap": 0.9}})
    assert found["grid"]["pixel_ap"] == {
        "mean": pytest.approx(0.3),
        "std": pytest.approx(np.std([0.1, 0.3, 0.5], ddof=1)),
        "seeds": 3,
    }
    assert found["wood"]["pixel_ap"] == {"mean": 0.9, "std": None, "seeds": 1}


def test_seeds_that_leave_a_metric_undefined_are_left_out() -> None:
    found = summarize_seeds({"x_seed0": {"image_auroc": None}, "x_seed1": {"image_auroc": 0.8}})
    assert found["x"]["image_auroc"] == {"mean": 0.8, "std": None, "seeds": 1}


def test_a_run_without_a_seed_in_its_name_is_not_pooled_with_the_seeds() -> None:
    runs = {"grid": {"pixel_ap": 0.9}, "grid_seed0": {"pixel_ap": 0.1}, "grid_seed1": {"pixel_ap": 0.3}}
    found = summarize_seeds(runs)
    assert found["grid"]["pixel_ap"] == {"mean": 0.9, "std": None, "seeds": 1}
    assert found["grid_seed*"]["pixel_ap"]["mean"] == pytest.approx(0.2)
    assert found["grid_seed*"]["pixel_ap"]["seeds"] == 2
