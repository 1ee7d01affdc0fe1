"""Probabilities behind focal confidences: against the loss's own minimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from almrr_pipeline.model.posterior import to_probability, undo_focal, weigh_odds


@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("probability", [0.03, 0.3, 0.5, 0.8, 0.99])
def test_it_inverts_the_loss(gamma: float, probability: float) -> None:
    """The confidence that minimizes the expected focal loss goes back to the probability."""

    def expected_loss(v: float) -> float:
        positive = -((1 - v) ** gamma) * np.log(v)
        negative = -(v**gamma) * np.log(1 - v)
        return float(probability * positive + (1 - probability) * negative)

    best = minimize_scalar(
        expected_loss, bounds=(1e-9, 1 - 1e-9), method="bounded", options={"xatol": 1e-10}
    ).x
    found = float(undo_focal(torch.tensor(best, dtype=torch.float64), gamma))
    assert found == pytest.approx(probability, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_order_ends_and_type_stay(dtype: torch.dtype) -> None:
    values = torch.linspace(0.0, 1.0, 1001).to(dtype)
    found = undo_focal(values, 2.0)
    assert found.dtype == dtype
    assert bool((found.diff() >= 0).all())
    assert found[[0, 500, 1000]].tolist() == [0.0, pytest.approx(0.5, abs=0.01), 1.0]


def test_without_gamma_the_map_is_the_confidence_within_its_range() -> None:
    assert to_probability(torch.tensor([-0.1, 0.3, 1.1]), 0.0).tolist() == pytest.approx(
        [0, 0.3, 1]
    )
    assert to_probability(torch.tensor([-0.1, 1.1]), 2.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_odds_are_multiplied(dtype: torch.dtype) -> None:
    probability = torch.tensor([0.5, 0.5, 0.2, 0.9], dtype=dtype)
    distance = torch.tensor([1.0, 2.0, 2.0, 0.5], dtype=dtype)
    found = weigh_odds(probability, distance, 2.0)
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx([0.5, 0.8, 0.5, 9 / 13], rel=1e-2)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 6.0, 32.0])
def test_certainty_stays_and_nothing_overflows(exponent: float) -> None:
    distance = torch.tensor([0.0, 1e-9, 1.0, 1e9, torch.inf])
    for certain in (0.0, 1.0):
        found = weigh_odds(torch.full((5,), certain), distance, exponent)
        assert found.tolist() == [certain] * 5
    found = weigh_odds(torch.full((5,), 0.3), distance, exponent)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert bool((found.diff() >= 0).all())
