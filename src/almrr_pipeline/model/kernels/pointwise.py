"""1x1 convolutions, and what the FRM is told of F and F_hat, without passes over whole maps.

At 256 x 256 the features of a batch of eight fill 23 MB, more than a cache: on a CPU each pass over
them costs what their arithmetic does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.kernels.scan.reference import widen

_BLOCK = 1 << 16  # values of a block: 256 KiB in float32, of which three fit into most L2 caches


def convolve_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution (B, C, h, w) -> (B, k, h, w).

    On a CPU with channels innermost it is a product of matrices: torch's convolution would fill and
    copy maps of their size in its backward pass.

    Args:
        x: features, (B, C, h, w).
        weight: (k, C, 1, 1).
        bias: (k,), or None.
    """
    if x.device.type != "cpu" or not _has_channels_innermost(x):
        return F.conv2d(x, weight, bias)
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def mix_residuals(features: Tensor, reconstruction: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution of log(1 + (F - F_hat)^2): (B, C, h, w) twice -> (B, r, h, w).

    Half precision overflows, so that up to the logarithm it is computed in float32. On a CPU with
    channels innermost the logarithms are never kept: forward and backward pass compute them in
    blocks that stay in cache.

    Args:
        features: F, which has no gradient there, since it comes from the frozen backbone.
        reconstruction: F_hat.
        weight: (r, C, 1, 1).
        bias: (r,).
    """
    if not _suits_blocks(features, reconstruction, weight):
        squares = (widen(features) - widen(reconstruction)).square()  # (B, C, h, w)
        return convolve_pointwise(squares.log1p().to(weight.dtype), weight, bias)
    cells = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (features, reconstruction))  # (n, C) each
    mixed: Tensor = _MixedResiduals.apply(*cells, weight.flatten(1), bias)
    batch, _, rows, columns = features.shape
    return mixed.view(batch, rows, columns, -1).permute(0, 3, 1, 2)


def _suits_blocks(features: Tensor, reconstruction: Tensor, weight: Tensor) -> bool:
    """Whether the blocks may be taken: on a CPU, in one type, channels innermost, F constant."""
    if features.device.type != "cpu" or features.requires_grad or torch.compiler.is_compiling():
        return False
    same = features.dtype == reconstruction.dtype == weight.dtype
    innermost = (_has_channels_innermost(x) for x in (features, reconstruction))
    return same and not torch.is_autocast_enabled("cpu") and all(innermost)


def _has_channels_innermost(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


class _MixedResiduals(torch.autograd.Function):
    """log(1 + (F - F_hat)^2) @ weight^T + bias, for cells (n, C), block by block."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        features: Tensor,
        reconstruction: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(features, reconstruction, weight)
        mixed = features.new_empty(len(features), len(weight))
        for own, hat, out in _blocks(features, reconstruction, mixed):
            torch.addmm(bias, torch.sub(own, hat).square_().log1p_(), weight.T, out=out)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:  # noqa: ANN401
        features, reconstruction, weight = ctx.saved_tensors
        slopes = torch.empty_like(reconstruction)
        weight_gradient = torch.zeros_like(weight)
        for own, hat, arrived, out in _blocks(features, reconstruction, gradient, slopes):
            difference = torch.sub(hat, own)
            squares = difference.square()
            weight_gradient.addmm_(arrived.T, squares.log1p())
            torch.mm(arrived, weight, out=out)
            out.mul_(difference.mul_(2)).div_(squares.add_(1))
        return None, slopes, weight_gradient, gradient.sum(0)


def _blocks(features: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same cells of all, (n, any) each, as many at a time as fill a block of features."""
    cells = max(1, _BLOCK // features.shape[1])
    return zip(*(torch.split(x, cells) for x in (features, *others)), strict=True)
