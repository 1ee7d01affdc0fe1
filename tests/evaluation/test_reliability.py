"""Calibration error and range of anomaly maps, against values worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from almrr_pipeline.evaluation.reliability import Reliability


def measure(*pairs: tuple[Any, Any]) -> Any:
    """Of maps with their masks."""
    reliability = Reliability()
    for values, mask in pairs:
        known = None if mask is None else np.asarray(mask, dtype=bool)
        reliability.add(np.asarray(values, dtype=np.float32), known)
    return reliability.summarize()


def test_values_that_are_the_fractions_have_no_error() -> None:
    rng = np.random.default_rng(0)
    probability = rng.uniform(size=(2, 400, 400))
    masks = rng.uniform(size=probability.shape) < probability
    found = measure(*zip(probability, masks, strict=True))
    assert found["calibration_error"] < 0.01
    assert [row["pixels"] > 0 for row in found["bins"]] == [True] * 10


def test_the_error_is_weighted_by_pixels() -> None:
    """Three pixels of 0.25 with no anomaly, one of 0.75 that is one: (3 * 0.25 + 0.25) / 4."""
    found = measure(([[0.25, 0.25], [0.25, 0.75]], [[0, 0], [0, 1]]))
    assert found["calibration_error"] == pytest.approx(0.25)
    assert found["bins"] == [
        {"pixels": 3, "mean_value": 0.25, "anomalous_fraction": 0.0},
        {"pixels": 1, "mean_value": 0.75, "anomalous_fraction": 1.0},
    ]


def test_the_range_is_taken_inside_masks_and_of_normal_images() -> None:
    ramp = np.linspace(0.0, 1.0, 101)[None]
    mask = ramp <= 0.5
    found = measure((ramp, mask), (ramp / 2, None), (ramp / 4, None))
    assert found["defective_p99"] == pytest.approx(np.percentile(ramp[mask], 99), abs=1e-6)
    assert found["normal_p99"] == pytest.approx((0.99 / 2 + 0.99 / 4) / 2, abs=1e-6)


def test_an_empty_mask_has_no_high_value() -> None:
    found = measure(([[0.1, 0.9]], [[0, 0]]))
    assert (found["defective_p99"], found["normal_p99"]) == (None, None)
    assert measure() is None


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_what_is_no_probability_has_no_reliability(value: float) -> None:
    assert measure(([[0.1, value]], None), ([[0.1, 0.2]], None)) is None


def test_one_and_zero_belong_to_the_outer_bins() -> None:
    found = measure(([[0.0, 1.0]], [[0, 1]]))
    assert found["calibration_error"] == 0.0
    assert len(found["bins"]) == 2
