"""The fused CPU kernels as torch functions with gradients, on as many threads as torch uses."""

# ruff: noqa: N806, E741, ANN401 - names are those of the formulas; autograd's ctx has no type
from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from almrr_pipeline.model.kernels.bits import to_numpy
from almrr_pipeline.model.kernels.cpu_kernels import Array, spread
from almrr_pipeline.model.kernels.scan import numba_kernels as kernels
from almrr_pipeline.model.kernels.scan.operands import ScanOperands, gather_gradients

_LOG2_E = math.log2(math.e)
_SCRATCH = threading.local()
"""Kept per thread: new pages from the system would cost as much as the arithmetic."""


def scan_forward(scan: ScanOperands, *, keep: bool) -> tuple[Tensor, Tensor]:
    """Output (b, l, d); no states are kept, the backward pass computes them again."""
    dtype = _common_dtype(scan.u, scan.delta, scan.z)
    out = torch.empty(scan.u.shape, dtype=dtype)
    spread(kernels.scan_forward, _tasks(scan.u), _scan_inputs(scan, dtype), to_numpy(out.view(-1)))
    return out.to(scan.u.dtype), torch.empty(0)


def starts_shape(b: int, l: int, d: int, n: int, *, keep: bool) -> tuple[int]:
    """Shape of what the forward pass keeps: nothing."""
    return (0,)


def scan_backward(scan: ScanOperands, g: Tensor, _starts: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the eight tensors for the gradient g (b, l, d) of the output."""
    u, A = scan.u, scan.A
    (b, l, d), n = u.shape, A.shape[1]
    blocks = -(-d // kernels.BLOCK)
    dtype = _common_dtype(u, scan.delta, scan.z, g)
    du, d_delta, dz = (torch.empty(b, l, d, dtype=dtype) for _ in range(3))
    dA = torch.empty(b, n, d)
    dB, dC = torch.empty(blocks, b, l, n), torch.empty(blocks, b, l, n)
    dD, d_bias = torch.zeros(b, d), torch.zeros(b, d)
    outputs = (du, d_delta, dA, dB, dC, dD, dz, d_bias)
    gradients = kernels.ScanGradients(*(to_numpy(x.view(-1)) for x in outputs))
    size, arrived = kernels.scratch_size(l, n), to_numpy(g.to(dtype).contiguous().view(-1))
    spread(_scan_backward, _tasks(u), _scan_inputs(scan, dtype), arrived, gradients, size)
    return gather_gradients(scan[:8], (du, d_delta, dA.transpose(1, 2), *outputs[3:]))


def convolve_with_numba(
    x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False
) -> Tensor:
    """`causal_conv`, computed in float32, by a fused CPU kernel."""
    return _Convolution.apply(x, weight, bias, reverse)  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.reverse = reverse
        out = torch.empty(x.shape, dtype=_common_dtype(x))
        inputs = _conv_inputs(x, weight, bias, reverse, out.dtype)
        spread(kernels.conv_forward, _tasks(x), inputs, to_numpy(out.view(-1)))
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        b, l, d = x.shape
        dtype = _common_dtype(x, g)
        dx, d_bias = torch.empty(b, l, d, dtype=dtype), torch.zeros(b, d)
        d_weight = torch.zeros(b, weight.shape[1], d)
        inputs = _conv_inputs(x, weight, bias, ctx.reverse, dtype)
        arrived, *outputs = (
            to_numpy(each.view(-1)) for each in (g.to(dtype).contiguous(), dx, d_weight, d_bias)
        )
        spread(kernels.conv_backward, _tasks(x), inputs, arrived, *outputs)
        d_weight = d_weight.sum(0).t().to(weight.dtype)
        return dx.to(x.dtype), d_weight, d_bias.sum(0).to(bias.dtype), None


def _common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """bfloat16 if all that are given have it, else float32: the kernels are compiled for these."""
    half = all(x is None or x.dtype == torch.bfloat16 for x in tensors)
    return torch.bfloat16 if half else torch.float32


def _scan_inputs(scan: ScanOperands, dtype: torch.dtype) -> kernels.ScanInputs:
    """What the kernels read, in `dtype` what has d channels."""
    return kernels.ScanInputs(
        u=_rows(scan.u, dtype),
        delta=_rows(scan.delta, dtype),
        B=_rows(scan.B, torch.float32),
        C=_rows(scan.C, torch.float32),
        z=_rows(scan.u if scan.z is None else scan.z, dtype),
        A=(scan.A.detach().float() * _LOG2_E).t().contiguous().numpy(),
        D=_flat(scan.D),
        bias=_flat(torch.zeros(scan.u.shape[2]) if scan.delta_bias is None else scan.delta_bias),
        length=scan.u.shape[1],
        reverse=scan.reverse,
        softplus=scan.delta_softplus,
        gated=scan.z is not None,
    )


def _conv_inputs(
    x: Tensor, weight: Tensor, bias: Tensor, reverse: bool, dtype: torch.dtype
) -> kernels.ConvInputs:
    taps = weight.detach().float().t().contiguous().numpy()  # (taps, d)
    return kernels.ConvInputs(_rows(x, dtype), taps, _flat(bias), x.shape[1], reverse)


def _rows(tensor: Tensor, dtype: torch.dtype) -> kernels.Rows:
    """The kernels' view of (b, l, channels); copies for another type, and strided channels."""
    rows = tensor.detach().to(dtype)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    steps = zip(rows.shape, rows.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps)
    values = to_numpy(torch.as_strided(rows, (extent,), (1,)))
    return kernels.Rows(values, rows.stride(0), rows.stride(1))


def _flat(tensor: Tensor) -> Array:
    """A tensor's values as one row, float32; without a copy where it has them so."""
    return tensor.detach().float().contiguous().view(-1).numpy()


def _tasks(tensor: Tensor) -> int:
    """Images times blocks of channels."""
    return tensor.shape[0] * -(-tensor.shape[2] // kernels.BLOCK)


def _scan_backward(first: int, last: int, inputs: Any, g: Array, gradients: Any, size: int) -> None:
    """The kernel with scratch memory for `size` numbers."""
    kept: Array | None = getattr(_SCRATCH, "memory", None)
    if kept is None or kept.size < size:
        kept = _SCRATCH.memory = np.empty(size, np.float32)
    kernels.scan_backward(first, last, inputs, g, gradients, kept)
