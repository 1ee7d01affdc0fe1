"""Loss: reconstruction_weight * MSE(F_hat, phi) + refinement_weight * focal(map, M).

The paper's weights are 1 : 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.config import TrainSettings
from almrr_pipeline.model.almrr import TrainingOutput
from almrr_pipeline.model.kernels.scan.reference import without_autocast


def compute_losses(
    output: TrainingOutput, mask: Tensor, settings: TrainSettings, counted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its two terms before weighting, each a float32 scalar.

    Both are means over all pixels, or over those that are True in `counted`, bool (B, H, W).
    """
    pair = output.reconstruction, output.target
    reconstruction = (
        reconstruction_loss(*pair) if counted is None else _counted_reconstruction(*pair, counted)
    )
    refinement = focal_loss(output.logits, mask, settings.focal_gamma, counted)
    loss = settings.reconstruction_weight * reconstruction + settings.refinement_weight * refinement
    return loss, reconstruction, refinement


def focal_loss(
    logits: Tensor, mask: Tensor, gamma: float = 2.0, counted: Tensor | None = None
) -> Tensor:
    """Focal loss of a two-class map, averaged over all pixels: mean of -(1 - p)^gamma log p.

    p is the softmax probability of the true class. As in DRAEM (arXiv 2108.07610), whose refinement
    network ALMRR adopts, the classes are not weighted. Computed from log-softmax in float32, so
    that no probability rounds to 0.

    Args:
        logits: float, shape (B, 2, H, W); channel 0 is normal, channel 1 is anomalous.
        mask: bool or {0, 1} of any type, shape (B, H, W); 1 is anomalous.
        gamma: how strongly pixels that are already right are down-weighted; 0: cross entropy.
        counted: the pixels whose mean is taken, bool (B, H, W); None for all.

    Returns:
        float32 scalar, at least 0.
    """
    normal, anomalous = F.log_softmax(logits.float(), dim=1).unbind(1)  # (B, H, W) each
    # Not by `gather`, whose backward pass on a GPU sorts four million indices to be deterministic.
    log_true = torch.where(mask.bool(), anomalous, normal)
    # 1 - p by expm1: near p = 1 the plain difference rounds to 0. The floor keeps the power's slope
    # finite at p = 1.
    missing = (-torch.expm1(log_true)).clamp_min(torch.finfo(torch.float32).tiny)
    losses = -missing.pow(gamma) * log_true
    return losses.mean() if counted is None else _weighted_mean(losses, counted.float())


def reconstruction_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of F_hat against phi, both (B, C, h, w): float32 scalar, at least 0."""
    if reconstruction.dtype in (torch.float32, torch.bfloat16):
        return _SquaredError.apply(reconstruction, target)  # type: ignore[no-any-return]
    return F.mse_loss(reconstruction.float(), target.float())


def _counted_reconstruction(reconstruction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """The same, where a cell weighs by the fraction of its pixels that count."""
    grid = target.shape[-2], target.shape[-1]
    weights = F.adaptive_avg_pool2d(counted.float()[:, None], grid)[:, 0]
    squares = (reconstruction.float() - target.float()).square()
    return _weighted_mean(squares.mean(dim=1), weights)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).eps)


class _SquaredError(torch.autograd.Function):
    """The mean squared error without float32 copies: 3 GB of memory traffic instead of 11.

    At batch 32 of the paper's widths in bfloat16; on a CPU in float32 a third of `mse_loss`'s time.
    The difference is kept in the type of F_hat, the sum is taken in float32, of a cell's channels
    first: as one sum it is wrong by 3e-4 on a CPU. Float16 does not hold the gradient, a difference
    over 10^8 elements.
    """

    @staticmethod
    def forward(ctx: Any, reconstruction: Tensor, target: Tensor) -> Tensor:  # noqa: ANN401
        difference = reconstruction - target.to(reconstruction.dtype)
        ctx.save_for_backward(difference)
        with without_autocast(difference):  # which would copy the difference in float32
            norms = torch.linalg.vector_norm(difference, dim=1, dtype=torch.float32)  # (B, h, w)
        loss: Tensor = norms.square().sum() / difference.numel()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (difference,) = ctx.saved_tensors
        return difference * (gradient * (2 / difference.numel())), None
