"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn

from almrr_pipeline.config import TrainSettings
from almrr_pipeline.model.almrr import ALMRR

NO_DECAY = ("A_log", "position")
"""Parameters of several dimensions that do not decay: the scan's A, the position embedding."""
WARM_UP = 0.05
"""Fraction of the steps in which `cosine` rises linearly."""
RISE = 0.3
"""Fraction of the steps in which `one_cycle` rises; as the next, OneCycleLR's default in torch."""
START, END = 1 / 25, 1 / 250_000
"""First and last rate of `one_cycle`, as fractions of the largest."""


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Adam (weight decay is added to the gradient) or AdamW (decoupled decay).

    It moves the trained parameters, of which only matrices and kernels decay: not biases, norms,
    the scan's D and `NO_DECAY`, as is usual.
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.rpartition(".")[2] in NO_DECAY
            (others if exempt else decaying).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    algorithm = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return algorithm(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        fused=settings.precision != "16-mixed",  # the gradient scaler would unscale a second time
    )


def clip_gradient(
    fabric: Fabric, model: ALMRR, optimizer: _FabricOptimizer, limit: float
) -> Tensor:
    """Clip the gradient to the norm `limit` (0 for none); returns the norm before, float32 scalar.

    The norm is taken in the model's order of parameters. `Fabric.clip_gradients` takes it in the
    optimizer's, so that its rounding would depend on the groups of `build_optimizer`.
    """
    fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
    norm = nn.utils.clip_grad_norm_(model.trainable_parameters(), limit or math.inf)
    return norm.detach().float()


def set_learning_rate(optimizer: _FabricOptimizer, settings: TrainSettings, step: int) -> float:
    """Set and return the learning rate of a step."""
    rate = settings.learning_rate * learning_rate_factor(settings, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def learning_rate_factor(settings: TrainSettings, step: int) -> float:
    """Learning rate of a step (0 is the first) as a fraction of the largest.

    `constant`; `cosine`: a linear warm-up over the first 5 %, then half a cosine to 0; `one_cycle`:
    half a cosine up over the first 30 %, half a cosine down to nearly 0 (Smith, arXiv 1708.07120),
    equal to torch's OneCycleLR within rounding. A pure function of the step: there is no scheduler
    to resume, and a rate for a training of one step too.
    """
    steps = settings.steps
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "cosine":
        warm_up = max(1, round(WARM_UP * steps))
        if step < warm_up:
            return (step + 1) / warm_up
        return _anneal(1.0, 0.0, (step - warm_up + 1) / (steps - warm_up + 1))
    peak, last = max(RISE * steps - 1, 0.0), max(steps - 1, 1)
    if step < peak:
        return _anneal(START, 1.0, step / peak)
    return _anneal(1.0, END, (step - peak) / (last - peak))


def _anneal(start: float, end: float, fraction: float) -> float:
    """Half a cosine from `start` (at 0) to `end` (at 1 and beyond)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(fraction, 1.0))) / 2
