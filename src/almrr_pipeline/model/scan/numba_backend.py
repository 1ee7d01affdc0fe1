"""The fused CPU kernels as torch functions with gradients, spread over the threads that torch may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from almrr_pipeline.model.scan import numba_kernels as kernels

_LOG2_E = 1.4426950408889634


def scan_with_numba(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
) -> Tensor:
    """Selective scan as `almrr_pipeline.model.scan.selective_scan` describes it; computes in float32 whatever comes in."""
    scanned: Tensor = _Scan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return scanned


def convolve_with_numba(x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False) -> Tensor:
    """Causal depthwise convolution and SiLU as `almrr_pipeline.model.scan.causal_conv` describes it."""
    convolved: Tensor = _Convolution.apply(x, weight, bias, reverse)
    return convolved


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
    ) -> Tensor:
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias)
        ctx.flags = reverse, delta_softplus, z is not None
        out = torch.empty(u.shape, dtype=torch.float32)
        inputs = _scan_arguments(u, delta, A, B, C, D, z, delta_bias, ctx.flags)
        _spread(kernels.scan_forward, _tasks(u), *inputs, _flat(out))
        return out.to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, delta_bias = ctx.saved_tensors
        b, l, d = u.shape
        n = A.shape[1]
        blocks = -(-d // kernels.BLOCK)
        du, d_delta = torch.empty(b, l, d), torch.empty(b, l, d)
        dz = torch.empty(b, l, d) if z is not None else torch.empty(0)
        dA, dB, dC = torch.empty(b, n, d), torch.empty(blocks, b, l, n), torch.empty(blocks, b, l, n)
        dD, d_bias = torch.zeros(b, d), torch.zeros(b, d)
        inputs = _scan_arguments(u, delta, A, B, C, D, z, delta_bias, ctx.flags)
        outputs = (_flat(tensor) for tensor in (du, d_delta, dz, dA, dB, dC, dD, d_bias))
        _spread(kernels.scan_backward, _tasks(u), *inputs, _flat(g.float().contiguous()), *outputs)
        return (
            du.to(u.dtype),
            d_delta.to(delta.dtype),
            dA.sum(0).t().to(A.dtype),
            dB.sum(0).to(B.dtype),
            dC.sum(0).to(C.dtype),
            dD.sum(0).to(D.dtype),
            None if z is None else dz.to(z.dtype),
            None if delta_bias is None else d_bias.sum(0).to(delta_bias.dtype),
            None,
            None,
        )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.reverse = reverse
        out = torch.empty(x.shape, dtype=torch.float32)
        _spread(kernels.conv_forward, _tasks(x), *_conv_arguments(x, weight, bias, reverse), _flat(out))
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        b, l, d = x.shape
        dx, d_weight, d_bias = torch.zeros(b, l, d), torch.zeros(b, weight.shape[1], d), torch.zeros(b, d)
        inputs = _conv_arguments(x, weight, bias, ctx.reverse)
        outputs = (_flat(tensor) for tensor in (dx, d_weight, d_bias))
        _spread(kernels.conv_backward, _tasks(x), *inputs, _flat(g.float().contiguous()), *outputs)
        return dx.to(x.dtype), d_weight.sum(0).t().to(weight.dtype), d_bias.sum(0).to(bias.dtype), None


def _scan_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    flags: tuple[bool, bool, bool],
) -> tuple[Any, ...]:
    """What both scan kernels take after the range of tasks."""
    _, length, channels = u.shape
    bias = torch.zeros(channels) if delta_bias is None else delta_bias
    exponents = (A.detach().float() * _LOG2_E).t().contiguous().numpy()  # (n, d)
    gate = (_flat(torch.empty(0)), (0, 0)) if z is None else _strided(z)
    rows = (*_strided(u), *_strided(delta), exponents, *_strided(B), *_strided(C))
    vectors = (_flat(D.detach().float().contiguous()), _flat(bias.detach().float().contiguous()))
    return length, channels, A.shape[1], *flags, *rows, *vectors, *gate


def _conv_arguments(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> tuple[Any, ...]:
    """What both convolution kernels take after the range of tasks."""
    taps = weight.detach().float().t().contiguous().numpy()  # (width, d)
    return x.shape[1], x.shape[2], reverse, *_strided(x), taps, _flat(bias.detach().float().contiguous())


def _strided(tensor: Tensor) -> tuple[npt.NDArray[Any], tuple[int, int]]:
    """Flat float32 storage of (b, l, d) from its first element on, and the strides of b and l; no copy if it can be."""
    rows = tensor.detach().float()
    if rows.stride(-1) != 1 or min(rows.stride()) < 0:
        rows = rows.contiguous()
    by = rows.stride(0), rows.stride(1)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(rows.shape, rows.stride(), strict=True))
    return torch.as_strided(rows, (extent,), (1,)).numpy(), by


def _flat(tensor: Tensor) -> npt.NDArray[Any]:
    return tensor.view(-1).numpy()


def _tasks(tensor: Tensor) -> int:
    """Pictures times blocks of channels."""
    return tensor.shape[0] * -(-tensor.shape[2] // kernels.BLOCK)


def _spread(kernel: Callable[..., None], tasks: int, *arguments: Any) -> None:
    """Run the kernel on all tasks, over as many threads as torch uses; one share runs in the calling thread.

    The kernels release the interpreter's lock. Plain threads, not numba's own: those of numba may abort the process
    when two Python threads start a kernel at once, as a server does.
    """
    shares = max(1, min(torch.get_num_threads(), tasks))
    ends = [tasks * share // shares for share in range(shares + 1)]
    others = [
        _threads(os.getpid(), shares - 1).submit(kernel, first, last, *arguments)
        for first, last in zip(ends[1:-1], ends[2:], strict=True)
    ]
    kernel(ends[0], ends[1], *arguments)
    for other in others:
        other.result()


@lru_cache(maxsize=8)
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    """Waiting threads, kept from call to call; a forked process must not wait for its parent's."""
    return ThreadPoolExecutor(count, thread_name_prefix=f"almrr-scan-{process}")
