"""1x1 convolutions, and what the FRM is told of F and F_hat, without passes over whole maps.

At 256 x 256 the features of a batch of eight fill 23 MB, more than a cache: on a CPU each pass over
them costs what their arithmetic does not.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.kernels.scan.reference import widen


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
    channels innermost the logarithms are never kept: both passes compute them in fused kernels.

    Args:
        features: F, which has no gradient there, since it comes from the frozen backbone.
        reconstruction: F_hat.
        weight: (r, C, 1, 1).
        bias: (r,).
    """
    if not _suits_kernels(features, reconstruction, weight):
        squares = (widen(features) - widen(reconstruction)).square()  # (B, C, h, w)
        return convolve_pointwise(squares.log1p().to(weight.dtype), weight, bias)
    from almrr_pipeline.model.kernels.residual_kernels import MixedResiduals  # imports numba

    cells = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (features, reconstruction))  # (n, C) each
    mixed: Tensor = MixedResiduals.apply(*cells, weight.flatten(1), bias)
    batch, _, rows, columns = features.shape
    return mixed.view(batch, rows, columns, -1).permute(0, 3, 1, 2)


def _suits_kernels(features: Tensor, reconstruction: Tensor, weight: Tensor) -> bool:
    """Whether the CPU's kernels can take them: types, channels innermost, F constant."""
    if features.device.type != "cpu" or features.requires_grad or torch.compiler.is_compiling():
        return False
    maps = (features, reconstruction)
    typed = all(x.dtype in (torch.float32, torch.bfloat16) for x in (*maps, weight))
    return typed and all(map(_has_channels_innermost, maps)) and has_numba()


@cache
def has_numba() -> bool:
    """Whether the CPU's own kernels can run."""
    return importlib.util.find_spec("numba") is not None


def _has_channels_innermost(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
