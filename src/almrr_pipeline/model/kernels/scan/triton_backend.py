"""The selective scan for GPUs in Triton: forward and backward, in either direction.

A program is one image and one block of channels; it loops over the tokens with the state
(n, channels) in registers. One warp holds 32 channels, a lane each with all n states of its
channel: sums over states stay within a lane, and loads of u, delta and z are coalesced because
channels are innermost in memory. `tl.range(num_stages)` lets the loads of the next tokens run ahead
of the arithmetic, which a loop of dependent steps needs.

The forward pass keeps the state at the start of every chunk of `_CHUNK` tokens, a sixteenth of all
states. The backward pass goes through the chunks from the last to the first, computes a chunk's
states again into scratch memory, and goes back over its tokens. Gradients of B and C, which all
channels share, are written per block of channels and summed by torch: no atomics, so results are
equal in every run. The arithmetic is float32 for any input.
"""

# ruff: noqa: N803, N806, E741, ANN001, ANN202, ANN401 - names of formulas; kernels are untyped
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from almrr_pipeline.model.kernels.scan.operands import ScanOperands, gather_gradients

_CHUNK = 16
"""Tokens per kept state: about the square root of the paper's 256 tokens."""
_BLOCK_D = 32
"""Channels of a program: one per lane of a warp."""
_STAGES = 3
"""Tokens whose loads run ahead."""


def scan_with_triton(scan: ScanOperands) -> Tensor:
    """`selective_scan` in float32 by Triton kernels."""
    return _Scan.apply(*scan)  # type: ignore[no-any-return]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse = ScanOperands(*operands)
        keep = any(ctx.needs_input_grad)
        b, l, d = u.shape
        chunks = triton.cdiv(l, _CHUNK) if keep else 0
        starts = torch.empty(b, chunks, A.shape[1], d, dtype=torch.float32, device=u.device)
        out = torch.empty(b, l, d, dtype=u.dtype, device=u.device)
        rows, strides = _rows(u, delta, B, C, u if z is None else z)
        ctx.constants = {
            "REVERSE": reverse, "SOFTPLUS": delta_softplus, "GATED": z is not None,
            "CHUNK": _CHUNK, "BLOCK_N": triton.next_power_of_2(A.shape[1]), "BLOCK_D": _BLOCK_D,
            "STAGES": _STAGES, "num_warps": 1,
        }  # fmt: skip
        given, sizes = (*rows, *_vectors(A, D, delta_bias)), (l, d, A.shape[1])
        _launch(_forward, *given, out, starts, *strides, *sizes, KEEP=keep, **ctx.constants)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, starts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, delta_bias, starts = ctx.saved_tensors
        (b, l, d), n = u.shape, A.shape[1]
        blocks = triton.cdiv(d, _BLOCK_D)

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=u.device)

        rows, strides = _rows(u, delta, B, C, u if z is None else z)
        scratch = empty(b, blocks, _CHUNK, ctx.constants["BLOCK_N"], _BLOCK_D)
        du, d_delta, dz = (
            torch.empty_like(rows[k], memory_format=torch.contiguous_format) for k in (0, 1, 4)
        )
        dA, dB, dC = empty(b, n, d), empty(blocks, b, l, n), empty(blocks, b, l, n)
        dD, d_bias = empty(b, d), empty(b, d)
        _launch(
            _backward, *rows, *_vectors(A, D, delta_bias), g.contiguous(), starts, scratch,
            du, d_delta, dz, dA, dB, dC, dD, d_bias, *strides, l, d, n, **ctx.constants,
        )  # fmt: skip
        return gather_gradients(ctx.saved_tensors[:8], (du, d_delta, dA, dB, dC, dD, dz, d_bias))


def _rows(*given: Tensor) -> tuple[list[Tensor], list[int]]:
    """The tensors (b, l, ...) with contiguous channels, and their other strides."""
    tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in given]
    return tensors, [stride for t in tensors for stride in t.stride()[:2]]


def _vectors(A: Tensor, D: Tensor, delta_bias: Tensor | None) -> list[Tensor]:
    """A (n, d), D (d,) and the bias (d,), float32 and contiguous."""
    bias = torch.zeros_like(D) if delta_bias is None else delta_bias
    return [tensor.detach().float().contiguous() for tensor in (A.t(), D, bias)]


def _launch(kernel: Any, u: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run one program per block of channels and image, on the tensors' device."""
    # Blocks of channels first: programs of one image, which share B and C, run together.
    grid = (triton.cdiv(u.shape[2], _BLOCK_D), u.shape[0])
    # Triton launches on the current device, which may not be the tensors'.
    with torch.cuda.device(u.device) if u.is_cuda else contextlib.nullcontext():
        kernel[grid](u, *arguments, **constants)


@triton.jit
def _load(pointer, has):
    """Values in float32, zero beyond the tensor's end."""
    return tl.load(pointer, mask=has, other=0.0).to(tl.float32)


@triton.jit
def _softplus(x):
    """log(1 + e^x), also where 1 + e^x rounds to 1 (Kahan's log1p)."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _forward(
    u, delta, B, C, z, A, D, bias, out, starts,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, length, channels, states,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output (b, l, d), and starts (b, chunks, n, d): the state before each chunk."""
    batch = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    has_c, has_n = c < channels, n < states
    has = has_n[:, None] & has_c[None, :]
    cell = n[:, None] * channels + c[None, :]
    decay = _load(A + cell, has)
    skip = _load(D + c, has_c)
    offset = _load(bias + c, has_c)
    chunks = tl.cdiv(length, CHUNK)
    h = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for step in tl.range(0, length, num_stages=STAGES):
        t = length - 1 - step if REVERSE else step
        x = _load(u + batch * u_b + t * u_l + c, has_c)
        dt = _load(delta + batch * delta_b + t * delta_l + c, has_c) + offset
        b_t = _load(B + batch * B_b + t * B_l + n, has_n)
        c_t = _load(C + batch * C_b + t * C_l + n, has_n)
        if SOFTPLUS:
            dt = _softplus(dt)
        if KEEP:
            at = starts + (batch * chunks + step // CHUNK) * states * channels + cell
            tl.store(at, h, mask=has & (step % CHUNK == 0))
        h = tl.exp(dt[None, :] * decay) * h + b_t[:, None] * (dt * x)[None, :]
        y = tl.sum(h * c_t[:, None], axis=0) + skip * x
        if GATED:
            gate = _load(z + batch * z_b + t * z_l + c, has_c)
            y = y * gate * _sigmoid(gate)
        tl.store(out + (batch * length + t) * channels + c, y.to(out.dtype.element_ty), mask=has_c)


@triton.jit
def _backward(
    u, delta, B, C, z, A, D, bias, g, starts, scratch, du, d_delta, dz, dA, dB, dC, dD, d_bias,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, length, channels, states,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of u, delta, z (b, l, d); per image A (b, n, d), D, bias (b, d); per block B, C."""
    batch = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    c = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    has_c, has_n = c < channels, n < states
    has = has_n[:, None] & has_c[None, :]
    cell = n[:, None] * channels + c[None, :]
    decay = _load(A + cell, has)
    skip = _load(D + c, has_c)
    offset = _load(bias + c, has_c)
    chunks = tl.cdiv(length, CHUNK)
    own = batch * tl.num_programs(0) + block
    local = scratch + own * CHUNK * BLOCK_N * BLOCK_D
    local += n[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    sums = (block * tl.num_programs(1).to(tl.int64) + batch) * length * states + n
    dh = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    sum_A = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    sum_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    sum_bias = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for index in range(0, chunks):
        chunk = chunks - 1 - index
        first = chunk * CHUNK
        count = tl.minimum(CHUNK, length - first)
        h = _load(starts + (batch * chunks + chunk) * states * channels + cell, has)
        for step in tl.range(0, count, num_stages=STAGES):
            t = length - 1 - (first + step) if REVERSE else first + step
            x = _load(u + batch * u_b + t * u_l + c, has_c)
            dt = _load(delta + batch * delta_b + t * delta_l + c, has_c) + offset
            b_t = _load(B + batch * B_b + t * B_l + n, has_n)
            if SOFTPLUS:
                dt = _softplus(dt)
            tl.store(local + step * BLOCK_N * BLOCK_D, h)
            h = tl.exp(dt[None, :] * decay) * h + b_t[:, None] * (dt * x)[None, :]
        tl.debug_barrier()  # a thread reads below what another one has written
        for back in tl.range(0, count, num_stages=STAGES):
            step = count - 1 - back
            t = length - 1 - (first + step) if REVERSE else first + step
            at = (batch * length + t) * channels + c
            x = _load(u + batch * u_b + t * u_l + c, has_c)
            raw = _load(delta + batch * delta_b + t * delta_l + c, has_c) + offset
            b_t = _load(B + batch * B_b + t * B_l + n, has_n)
            c_t = _load(C + batch * C_b + t * C_l + n, has_n)
            gy = _load(g + at, has_c)
            before = tl.load(local + step * BLOCK_N * BLOCK_D)
            dt = raw
            if SOFTPLUS:
                dt = _softplus(raw)
            fade = tl.exp(dt[None, :] * decay)
            h = fade * before + b_t[:, None] * (dt * x)[None, :]
            if GATED:
                gate = _load(z + batch * z_b + t * z_l + c, has_c)
                sigmoid = _sigmoid(gate)
                y = tl.sum(h * c_t[:, None], axis=0) + skip * x
                d_gate = gy * y * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                tl.store(dz + at, d_gate.to(dz.dtype.element_ty), mask=has_c)
                gy = gy * gate * sigmoid
            dh += gy[None, :] * c_t[:, None]
            tl.store(dC + sums + t * states, tl.sum(gy[None, :] * h, axis=1), mask=has_n)
            tl.store(dB + sums + t * states, tl.sum(dh * (dt * x)[None, :], axis=1), mask=has_n)
            d_input = tl.sum(dh * b_t[:, None], axis=0)  # gradient of dt x
            dh = dh * fade
            exponent = dh * before
            sum_A += exponent * dt[None, :]
            d_dt = tl.sum(exponent * decay, axis=0) + d_input * x
            if SOFTPLUS:
                d_dt = d_dt * _sigmoid(raw)
            sum_D += gy * x
            sum_bias += d_dt
            tl.store(du + at, (d_input * dt + gy * skip).to(du.dtype.element_ty), mask=has_c)
            tl.store(d_delta + at, d_dt.to(d_delta.dtype.element_ty), mask=has_c)
        tl.debug_barrier()  # the next chunk overwrites the scratch memory
    tl.store(dA + batch * states * channels + cell, sum_A, mask=has)
    tl.store(dD + batch * channels + c, sum_D, mask=has_c)
    tl.store(d_bias + batch * channels + c, sum_bias, mask=has_c)
