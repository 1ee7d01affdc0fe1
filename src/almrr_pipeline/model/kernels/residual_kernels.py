"""Mixtures of log(1 + (F - F_hat)^2) as two CPU kernels, one for each direction.

A kernel runs the tasks `first` to `last`. A task is `CELLS` cells, each a row of channels, so that
the result does not depend on the threads. Neither the logarithms nor a copy of F in another type
are ever in memory.
"""

# ruff: noqa: ANN401 - numba's scalars and autograd's ctx have no Python type
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.kernels.bits import (
    FRACTION_BITS,
    Bits,
    as_float32,
    as_integer,
    narrow,
    to_numpy,
    widen,
)
from almrr_pipeline.model.kernels.cpu_kernels import Array, compile_kernel, compile_part, spread

CELLS = 512
"""Cells of a task: enough tasks for many threads, few gradients of the weights to add up."""
LANES = 64
"""Sums run over a multiple of it: what no multiple is left of would be added one by one."""

_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
_LN_2 = np.float32(np.log(2.0))
_SQRT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
# 2 atanh(x) / x in x^2 on [0, 0.0295] to 2e-9, by its Taylor series.
_L0, _L1, _L2 = np.float32(2.0), np.float32(2.0 / 3.0), np.float32(2.0 / 5.0)
_L3, _L4 = np.float32(2.0 / 7.0), np.float32(2.0 / 9.0)


class MixedResiduals(torch.autograd.Function):
    """log(1 + (F - F_hat)^2) @ weight^T + bias, for cells (n, C), in the type of F_hat.

    F and F_hat are float32 or bfloat16, each its own; in between all is computed in float32.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, hat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Mixtures (n, r) of cells (n, C), with weight (r, C) and bias (r,)."""
        ctx.save_for_backward(features, hat, weight)
        mixed = hat.new_empty(len(hat), len(weight))
        padded = F.pad(weight.detach().float(), (0, -weight.shape[1] % LANES))
        inputs = to_numpy(features), to_numpy(hat), to_numpy(padded)
        spread(mix, -(-len(hat) // CELLS), *inputs, to_numpy(bias.float()), to_numpy(mixed))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        """Gradients of F_hat, the weight and the bias."""
        features, hat, weight = ctx.saved_tensors
        tasks = -(-len(hat) // CELLS)
        slopes = torch.empty_like(hat)
        parts = torch.zeros(tasks, *weight.shape)
        inputs = to_numpy(features), to_numpy(hat), to_numpy(weight.float())
        gradient = gradient.contiguous()
        outputs = to_numpy(slopes), to_numpy(parts)
        spread(differentiate, tasks, *inputs, to_numpy(gradient.float()), *outputs)
        d_weight = parts.sum(0).to(weight.dtype)
        return None, slopes, d_weight, gradient.sum(0, dtype=torch.float32).to(weight.dtype)


@compile_kernel
def mix(
    first: int, last: int, features: Array | Bits, hat: Array | Bits,
    weight: Array, bias: Array, out: Array | Bits,
) -> None:  # fmt: skip
    """Write the mixtures (n, r)."""
    outputs, lanes = weight.shape
    channels = hat.shape[1]
    logs = np.zeros(lanes, np.float32)
    for cell in range(first * CELLS, min(last * CELLS, len(hat))):
        own, other = features[cell], hat[cell]
        for c in range(channels):
            difference = widen(other[c]) - widen(own[c])
            logs[c] = _log1p(difference * difference)
        for r in range(outputs):
            total, row = _ZERO, weight[r]
            for c in range(lanes):
                total += row[c] * logs[c]
            out[cell, r] = narrow(total + bias[r], out[cell, r])


@compile_kernel
def differentiate(
    first: int, last: int, features: Array | Bits, hat: Array | Bits,
    weight: Array, gradient: Array, slopes: Array | Bits, d_weight: Array,
) -> None:  # fmt: skip
    """Write the gradient of F_hat (n, C), and add to that of the weight (tasks, r, C)."""
    outputs, channels = weight.shape
    logs = np.empty(channels, np.float32)
    factors = np.empty(channels, np.float32)  # of log(1 + x^2) by x
    sums = np.empty(channels, np.float32)
    for cell in range(first * CELLS, min(last * CELLS, len(hat))):
        own, other = features[cell], hat[cell]
        for c in range(channels):
            difference = widen(other[c]) - widen(own[c])
            square = difference * difference
            logs[c] = _log1p(square)
            factors[c] = _TWO * difference / (_ONE + square)
            sums[c] = _ZERO
        for r in range(outputs):
            arrived, row, d_row = gradient[cell, r], weight[r], d_weight[cell // CELLS, r]
            for c in range(channels):
                sums[c] += arrived * row[c]
            for c in range(channels):
                d_row[c] += arrived * logs[c]
        slope = slopes[cell]
        for c in range(channels):
            slope[c] = narrow(sums[c] * factors[c], slope[c])


@compile_part
def _log1p(x: Any) -> Any:
    """log(1 + x) for x >= 0 to 2e-7 of it; NaN stays NaN.

    1 + x = 2^k m with m in [sqrt(1/2), sqrt(2)), and log m = 2 atanh((m - 1) / (m + 1)).
    """
    bits = as_integer(_ONE + x)
    k = (bits - _SQRT_HALF) >> FRACTION_BITS
    beyond = as_float32(bits - (k << FRACTION_BITS)) - _ONE
    beyond = x if k == 0 else beyond  # without the rounding of 1 + x
    s = beyond / (_TWO + beyond)
    q = s * s
    logarithm = s * ((((_L4 * q + _L3) * q + _L2) * q + _L1) * q + _L0)
    return np.float32(k) * _LN_2 + logarithm + _ZERO * x  # the last is NaN where x is not finite
