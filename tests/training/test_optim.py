from __future__ import annotations

import itertools

import pytest
import torch

from almrr_pipeline.config import TrainSettings
from almrr_pipeline.training.optim import learning_rate_factor


def factors_of(schedule: str, steps: int, *, more: int = 0) -> list[float]:
    settings = TrainSettings(schedule=schedule, steps=steps)
    return [learning_rate_factor(settings, step) for step in range(steps + more)]


def test_constant_is_one() -> None:
    assert set(factors_of("constant", 50)) == {1.0}


def test_cosine_rises_in_a_line_and_falls_to_almost_nothing() -> None:
    factors = factors_of("cosine", 100)
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5 + 47] == pytest.approx(0.5)  # half of the way down, (52 - 5 + 1) / 96
    assert 0 < factors[-1] < 0.001
    assert all(later < sooner for sooner, later in itertools.pairwise(factors[4:]))


@pytest.mark.parametrize("steps", [10, 100, 333])
def test_one_cycle_equals_torchs(steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps, cycle_momentum=False
    )
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    factors = factors_of("one_cycle", steps)
    assert factors == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_shortest_trainings_have_a_rate_at_every_step(schedule: str, steps: int) -> None:
    factors = factors_of(schedule, steps, more=1)
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) > 0.1
