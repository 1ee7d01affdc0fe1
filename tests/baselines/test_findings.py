"""Warnings of a comparison appear where there is reason for them, and only there."""

from __future__ import annotations

import pytest

from almrr_pipeline.baselines.findings import list_warnings

LEAKING = {"nearest_image_image_auroc": 0.984, "nearest_image_normal_with_twin": 0.97}


def test_a_leaking_split_is_named() -> None:
    (warning,) = list_warnings({"mt_defect": LEAKING, "mt_defect_tiles": {}})
    assert warning.startswith("mt_defect: the split leaks")
    assert "0.984" in warning


@pytest.mark.parametrize(
    "changed",
    [
        {"nearest_image_image_auroc": 0.743},
        {"nearest_image_normal_with_twin": 0.0},  # large defects, seen in the whole image
        {"nearest_image_image_auroc": None, "nearest_image_normal_with_twin": None},
    ],
)
def test_a_sound_split_is_not(changed: dict[str, float | None]) -> None:
    assert list_warnings({"x": LEAKING | changed}) == []


def test_a_better_memory_bank_is_named_with_both_values() -> None:
    metrics = {"image_auroc": 0.88, "memory_bank_image_auroc": 0.955}
    metrics |= {"pixel_ap": 0.53, "memory_bank_pixel_ap": 0.54}  # less than seeds differ by
    (warning,) = list_warnings({"x": metrics})
    assert "image AUROC (0.955 against 0.880)" in warning
    assert "pixel AP" not in warning


def test_a_better_memory_bank_in_several_metrics_is_recommended() -> None:
    metrics = {"image_auroc": 0.8, "memory_bank_image_auroc": 0.9}
    metrics |= {"pixel_ap": 0.3, "memory_bank_pixel_ap": 0.5}
    (warning,) = list_warnings({"x": metrics})
    assert warning.endswith("For this data it is the better choice.")
