"""The selective scan in torch alone: the reference, for every device and dtype.

With autograd, a loop that indexes `x[:, t]` writes a full-size gradient per step: quadratic in the
length. Here the tensors are time-major, so that a step reads one contiguous slice, and the
recurrence has a hand-written backward of the same cost as its forward:

    h_t = a_t h_{t-1} + b_t        db_t = g_t + a_{t+1} db_{t+1}        da_t = db_t h_{t-1}
"""

# ruff: noqa: N806, ANN401 - names are those of the formulas; autograd's ctx has no type
from __future__ import annotations

import contextlib
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.kernels.scan.operands import ScanOperands


def scan_with_torch(scan: ScanOperands) -> Tensor:
    """Reference of `selective_scan`; float64 stays float64."""
    with without_autocast(scan.u):
        u, delta, A, B, C, D = (widen(tensor) for tensor in scan[:6])
        delta = discretize_delta(delta, scan).transpose(0, 1)  # (l, b, d)
        decay = torch.exp(delta.unsqueeze(-1) * A)  # (l, b, d, n)
        inputs = (delta * u.transpose(0, 1)).unsqueeze(-1)  # (l, b, d, 1)
        increments = inputs * B.transpose(0, 1).unsqueeze(2)  # (l, b, d, n)
        states = _Recurrence.apply(decay, increments, scan.reverse)
        y = torch.matmul(states, C.transpose(0, 1).unsqueeze(-1)).squeeze(-1)  # (l, b, d)
        y = y.transpose(0, 1)  # (b, l, d)
        return skip_and_gate(y, u, D, scan.z).to(scan.u.dtype)


def convolve_with_torch(
    x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False
) -> Tensor:
    """Reference of `causal_conv`."""
    width, length = weight.shape[1], x.shape[1]
    padding = (0, 0, 0, width - 1) if reverse else (0, 0, width - 1, 0)
    padded = F.pad(x, padding)  # (b, l + width - 1, d)
    taps = weight.flip(1) if reverse else weight
    y = bias + padded[:, :length] * taps[:, 0]
    for k in range(1, width):
        y = torch.addcmul(y, padded[:, k : k + length], taps[:, k])
    return F.silu(y).to(x.dtype)


def widen(tensor: Tensor) -> Tensor:
    """At least float32: half precision is too coarse for a recurrence over hundreds of steps."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def discretize_delta(delta: Tensor, scan: ScanOperands) -> Tensor:
    """Step sizes softplus(delta + bias), with the bias and the softplus that `scan` asks for."""
    biased = delta if scan.delta_bias is None else delta + widen(scan.delta_bias)
    return F.softplus(biased) if scan.delta_softplus else biased


def skip_and_gate(y: Tensor, u: Tensor, skip: Tensor, z: Tensor | None) -> Tensor:
    """(y + D u) silu(z), or without the gate where z is None."""
    y = y + skip * u
    return y if z is None else y * F.silu(widen(z))


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Switch autocast off: a scan's own products must not become half precision again."""
    device = tensor.device.type
    # torch.amp.is_autocast_available is not compiled by torch 2.11.
    if device in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


class _Recurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t along the first dimension, from either end, starting from zero."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, increments: Tensor, reverse: bool) -> Tensor:
        states = torch.empty_like(increments)
        order = _order(len(decay), reverse)
        states[order[0]].copy_(increments[order[0]])
        for before, now in pairwise(order):
            torch.addcmul(increments[now], decay[now], states[before], out=states[now])
        ctx.save_for_backward(decay, states)
        ctx.reverse = reverse
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        decay, states = ctx.saved_tensors
        order = _order(len(decay), ctx.reverse)
        d_increments = gradient.clone(memory_format=torch.contiguous_format)
        for now, before in pairwise(reversed(order)):
            d_increments[before].addcmul_(decay[now], d_increments[now])
        d_decay = torch.empty_like(decay)
        d_decay[order[0]].zero_()
        earlier, later = slice(None, -1), slice(1, None)
        if ctx.reverse:
            earlier, later = later, earlier
        torch.mul(d_increments[later], states[earlier], out=d_decay[later])
        return d_decay, d_increments, None


def _order(length: int, reverse: bool) -> list[int]:
    """Indices of the tokens in the order of the scan."""
    return list(range(length - 1, -1, -1) if reverse else range(length))
