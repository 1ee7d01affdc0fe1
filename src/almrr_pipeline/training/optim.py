"""Learning rates over the steps, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

Schedule = Literal["constant", "cosine", "one_cycle"]

WARM_UP = 0.05
"""Share of the steps in which `cosine` rises linearly."""
RISE = 0.3
"""Share of the steps in which `one_cycle` rises."""
START, END = 1 / 25, 1 / 250_000
"""Where `one_cycle` begins and ends, as shares of the peak (torch's OneCycleLR: 1/25, and 1e-4 of that)."""


def learning_rate_factors(schedule: Schedule, steps: int) -> Callable[[int], float]:
    """The learning rate at each step, as a share of the largest.

    Args:
        schedule: `constant`; `cosine`: a linear warm-up over the first 5 %, then half a cosine to 0;
            `one_cycle`: half a cosine up over the first 30 %, half a cosine down to nearly 0 (Smith, arXiv 1708.07120).
        steps: length of the training.

    Returns:
        A function from the step (0 is the first) to a factor in (0, 1].
    """
    if schedule == "constant":
        return lambda step: 1.0
    return partial(_cosine if schedule == "cosine" else _one_cycle, steps)


def _cosine(steps: int, step: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return _anneal(1.0, 0.0, (step - warm_up + 1) / (steps - warm_up + 1))


def _one_cycle(steps: int, step: int) -> float:
    peak, last = max(RISE * steps - 1, 0.0), max(steps - 1, 1)
    if step < peak:
        return _anneal(START, 1.0, step / peak)
    return _anneal(1.0, END, (step - peak) / (last - peak))


def _anneal(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` (share 0) to `end` (share 1 and beyond)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
