"""The selective scan for GPUs in Triton: forward and backward, in either direction.

A program is one image, one block of channels and one span of the tokens. It goes through its span
in tiles (tokens, states, channels), one load per operand and tile. As compiled, for 16 states, a
lane of the single warp holds one channel, four states and all of a tile's tokens: the recurrence
stays in registers, a sum over states takes two shuffles, one over channels three.

Spans let a small batch fill a GPU. `_summarize` scans every span from a zero state and keeps its
last state and the sum of its step sizes; A does not depend on the token, so a span's decay is
exp(A sum dt). A program of the main kernels starts with the state that the spans before its own
leave:

    h = exp(A sum_s) h + end_s        for each earlier span s, in order

The forward pass keeps the state before every tile, an eighth of all states; the backward pass
computes a tile's states again in registers. Gradients of B and C, which all channels share, are
written per block of channels, those of A, D and the bias per span, and summed by torch: no atomics,
so results are equal in every run. The number of spans depends on the shape alone, not on the GPU.
The arithmetic is float32 for any input.
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

from almrr_pipeline.model.kernels.scan.operands import ScanOperands, gather_gradients

_TILE = 8
"""Most tokens of a tile."""
_CELLS = 1024
"""Most tokens x states x channels of a tile: with one warp 32 registers a tensor, as many as the
backward pass holds without spilling."""
_BLOCK_D = 8
"""Channels of a program: 32 bytes of float32, one sector of memory."""
_PROGRAMS = 1536
"""Programs that are enough: three warps for each of the 528 schedulers of an H100. A pass over a
split sequence issues up to six tenths more instructions, which pays only where schedulers idle."""
_WARPS = 1
"""Warps of a program: with one, nothing waits at a barrier."""
_STAGES = 1
"""Tiles whose loads run ahead, plus one."""


def scan_forward(scan: ScanOperands, *, keep: bool) -> tuple[Tensor, Tensor]:
    """Output (b, l, d), and the states of `starts_shape` for `scan_backward`."""
    u, A = scan.u, scan.A
    (b, l, d), n = u.shape, A.shape[1]
    out = torch.empty(b, l, d, dtype=u.dtype, device=u.device)
    starts = _empty(u, *starts_shape(b, l, d, n, keep=keep))
    given, constants = _prepare(scan)
    ends = _summarize_spans(given, u, constants)
    _launch(_forward, constants, given, *ends, out, starts, KEEP=keep)
    return out, starts


def starts_shape(b: int, l: int, d: int, n: int, *, keep: bool) -> tuple[int, int, int, int]:
    """Shape of the states before every tile."""
    return (b, -(-l // _tile(n)) if keep else 0, n, d)


def scan_backward(scan: ScanOperands, g: Tensor, starts: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the eight tensors for the gradient g (b, l, d) of the output."""
    u, A = scan.u, scan.A
    (b, l, d), n = u.shape, A.shape[1]
    given, constants = _prepare(scan)
    g = g.contiguous()
    blocks, spans = triton.cdiv(d, _BLOCK_D), _count_spans(u, n)
    ends = _summarize_spans(given, g, constants, backward=True)
    rows = (
        torch.empty(b, l, d, dtype=one.dtype, device=u.device)
        for one in (u, scan.delta, u if scan.z is None else scan.z)
    )
    du, d_delta, dz = rows
    dA, dB, dC = _empty(u, b * spans, d, n), _empty(u, blocks, b, l, n), _empty(u, blocks, b, l, n)
    dD, d_bias = _empty(u, b * spans, d), _empty(u, b * spans, d)
    results = du, d_delta, dA, dB, dC, dD, dz, d_bias
    _launch(_backward, constants, given, *ends, g, starts, *results)
    return gather_gradients(scan[:8], results)


def _tile(n: int) -> int:
    """Tokens of a tile for n states, a power of two."""
    return max(1, min(_TILE, _CELLS // (int(triton.next_power_of_2(n)) * _BLOCK_D)))


def _count_spans(u: Tensor, n: int) -> int:
    """As few spans of the tokens as give `_PROGRAMS` programs, each of a tile at least."""
    b, l, d = u.shape
    return min(-(-_PROGRAMS // (b * -(-d // _BLOCK_D))), -(-l // _tile(n)))


def _prepare(scan: ScanOperands) -> tuple[list[Any], dict[str, Any]]:
    """Arguments that all kernels begin with, and their constants."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse = scan
    (_, l, d), n = u.shape, A.shape[1]
    given = (u, delta, B, C, u if z is None else z)
    rows = [t if t.stride(-1) == 1 else t.contiguous() for t in given]
    bias = torch.zeros_like(D) if delta_bias is None else delta_bias
    vectors = [t.contiguous() for t in (A, D, bias)]
    strides = [stride for t in rows for stride in t.stride()[:2]]
    constants = {
        "REVERSE": reverse, "SOFTPLUS": delta_softplus, "GATED": z is not None,
        "TILE": _tile(n), "BLOCK_N": triton.next_power_of_2(n), "BLOCK_D": _BLOCK_D,
        "STAGES": _STAGES, "num_warps": _WARPS,
    }  # fmt: skip
    return [*rows, *vectors, *strides, l, d, n], constants


def _summarize_spans(
    given: list[Any], g: Tensor, constants: dict[str, Any], *, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Last states (b, spans, n, d) and sums of step sizes (b, spans, d); not for a single span."""
    u, n = given[0], given[-1]
    (b, _, d), spans = u.shape, _count_spans(u, n)
    ends, sums = _empty(u, b, spans, n, d), _empty(u, b, spans, d)
    if spans > 1:
        _launch(_summarize, constants, given, g, ends, sums, BACKWARD=backward)
    return ends, sums


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device=like.device)


def _launch(
    kernel: Any, constants: dict[str, Any], given: list[Any], *arguments: Any, **more: Any
) -> None:
    """Run one program per block of channels, image and span, on the tensors' device."""
    u, n = given[0], given[-1]
    # Blocks of channels first: programs of one image, which share B and C, run together.
    grid = (triton.cdiv(u.shape[2], _BLOCK_D), u.shape[0], _count_spans(u, n))
    # Triton launches on the current device, which may not be the tensors'.
    with torch.cuda.device(u.device) if u.is_cuda else contextlib.nullcontext():
        kernel[grid](*given, *arguments, **constants, **more)


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(pointer, has):
    """Values in float32, zero beyond the tensor's end."""
    return tl.load(pointer, mask=has, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, value, has):
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=has)


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
def _step_sizes(raw, has, SOFTPLUS: tl.constexpr):
    """Zero beyond the last token: a decay of 1 and no input, the state stays."""
    return tl.where(has, _softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def _row(tile, index):
    """Row of a tile by its index, for constant indices no operation: its rows are registers."""
    rows = tl.arange(0, tile.shape[0])[:, None, None]
    return tl.sum(tl.where(rows == index, tile, 0.0), axis=0)


@triton.jit
def _with_row(tile, index, row):
    rows = tl.arange(0, tile.shape[0])[:, None, None]
    return tl.where(rows == index, row[None, :, :], tile)


@triton.jit
def _carry(ends, sums, batch, span, decay, cell, c, has, has_c, channels, states,
           spans, BACKWARD: tl.constexpr):  # fmt: skip
    """State before a span from the summaries of the spans before it (`BACKWARD`: after it)."""
    state = tl.zeros(decay.shape, dtype=tl.float32)
    for index in range(spans - 1 - span if BACKWARD else span):
        at = batch * spans + (spans - 1 - index if BACKWARD else index)
        fade = tl.exp2(_load(sums + at * channels + c, has_c)[None, :] * decay)
        state = fade * state + _load(ends + at * states * channels + cell, has)
    return state


@triton.jit
def _summarize(
    u, delta, B, C, z, A, D, bias,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, length, channels, states,
    g, ends, sums,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """Last state (b, spans, n, d) of each span alone, or of its gradients; sums of step sizes."""
    batch, span, spans = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    has_c, has_n = c < channels, n < states
    has_cell = has_n[:, None] & has_c[None, :]
    cell = n[:, None] * channels + c[None, :]
    decay = _load(A + c[None, :] * states + n[:, None], has_cell) * LOG2_E
    offset = _load(bias + c, has_c)
    tiles = tl.cdiv(length, TILE)
    per_span = tl.cdiv(tiles, spans)
    first = span * per_span
    last = tl.minimum(first + per_span, tiles)
    state = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for index in tl.range(first, last, num_stages=STAGES):
        tile = first + last - 1 - index if BACKWARD else index
        step = tile * TILE + tl.arange(0, TILE)
        t = (length - 1 - step if REVERSE else step)[:, None]
        has_t = (step < length)[:, None]
        has, has_s = has_t & has_c[None, :], has_t & has_n[None, :]
        raw = _load(delta + batch * delta_b + t * delta_l + c[None, :], has) + offset[None, :]
        dt = _step_sizes(raw, has, SOFTPLUS)
        total += tl.sum(dt, axis=0)
        fade = tl.exp2(dt[:, None, :] * decay[None, :, :])
        if BACKWARD:
            c_t = _load(C + batch * C_b + t * C_l + n[None, :], has_s)
            gy = _load(g + batch * length * channels + t * channels + c[None, :], has)
            if GATED:
                gate = _load(z + batch * z_b + t * z_l + c[None, :], has)
                gy = gy * gate * _sigmoid(gate)
            inputs = gy[:, None, :] * c_t[:, :, None]
            for row in tl.static_range(TILE - 1, -1, -1):
                state = _row(fade, row) * (state + _row(inputs, row))
        else:
            x = _load(u + batch * u_b + t * u_l + c[None, :], has)
            b_t = _load(B + batch * B_b + t * B_l + n[None, :], has_s)
            inputs = (dt * x)[:, None, :] * b_t[:, :, None]
            for row in tl.static_range(TILE):
                state = _row(fade, row) * state + _row(inputs, row)
    at = batch * spans + span
    tl.store(ends + at * states * channels + cell, state, mask=has_cell)
    tl.store(sums + at * channels + c, total, mask=has_c)


@triton.jit
def _forward(
    u, delta, B, C, z, A, D, bias,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, length, channels, states,
    ends, sums, out, starts,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Output (b, l, d), and starts (b, tiles, n, d): the state before each tile."""
    batch, span, spans = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    has_c, has_n = c < channels, n < states
    has_cell = has_n[:, None] & has_c[None, :]
    cell = n[:, None] * channels + c[None, :]
    decay = _load(A + c[None, :] * states + n[:, None], has_cell) * LOG2_E
    skip = _load(D + c, has_c)[None, :]
    offset = _load(bias + c, has_c)
    tiles = tl.cdiv(length, TILE)
    per_span = tl.cdiv(tiles, spans)
    first = span * per_span
    last = tl.minimum(first + per_span, tiles)
    h = _carry(ends, sums, batch, span, decay, cell, c, has_cell, has_c, channels, states,
               spans, False)  # fmt: skip
    for tile in tl.range(first, last, num_stages=STAGES):
        step = tile * TILE + tl.arange(0, TILE)
        t = (length - 1 - step if REVERSE else step)[:, None]
        has_t = (step < length)[:, None]
        has, has_s = has_t & has_c[None, :], has_t & has_n[None, :]
        x = _load(u + batch * u_b + t * u_l + c[None, :], has)
        raw = _load(delta + batch * delta_b + t * delta_l + c[None, :], has) + offset[None, :]
        b_t = _load(B + batch * B_b + t * B_l + n[None, :], has_s)
        c_t = _load(C + batch * C_b + t * C_l + n[None, :], has_s)
        dt = _step_sizes(raw, has, SOFTPLUS)
        if KEEP:
            tl.store(starts + (batch * tiles + tile) * states * channels + cell, h, mask=has_cell)
        fade = tl.exp2(dt[:, None, :] * decay[None, :, :])
        states_t = (dt * x)[:, None, :] * b_t[:, :, None]  # the inputs, row by row the states
        for row in tl.static_range(TILE):
            h = _row(fade, row) * h + _row(states_t, row)
            states_t = _with_row(states_t, row, h)
        y = tl.sum(states_t * c_t[:, :, None], axis=1) + skip * x
        if GATED:
            gate = _load(z + batch * z_b + t * z_l + c[None, :], has)
            y = y * gate * _sigmoid(gate)
        _store(out + batch * length * channels + t * channels + c[None, :], y, has)


@triton.jit
def _backward(
    u, delta, B, C, z, A, D, bias,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, length, channels, states,
    ends, sums, g, starts, du, d_delta, dA, dB, dC, dD, dz, d_bias,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of u, delta, z (b, l, d); per span A, D, bias; per block of channels B, C."""
    batch, span, spans = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    block = tl.program_id(0)
    c = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    has_c, has_n = c < channels, n < states
    has_cell = has_n[:, None] & has_c[None, :]
    cell = n[:, None] * channels + c[None, :]
    decay = _load(A + c[None, :] * states + n[:, None], has_cell) * LOG2_E
    skip = _load(D + c, has_c)[None, :]
    offset = _load(bias + c, has_c)
    tiles = tl.cdiv(length, TILE)
    per_span = tl.cdiv(tiles, spans)
    first = span * per_span
    last = tl.minimum(first + per_span, tiles)
    origin = batch * length * channels
    own = (block * tl.num_programs(1).to(tl.int64) + batch) * length * states
    carry = _carry(ends, sums, batch, span, decay, cell, c, has_cell, has_c, channels, states,
                   spans, True)  # fmt: skip
    sum_A = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    sum_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    sum_bias = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for index in tl.range(first, last, num_stages=STAGES):
        tile = first + last - 1 - index
        step = tile * TILE + tl.arange(0, TILE)
        t = (length - 1 - step if REVERSE else step)[:, None]
        has_t = (step < length)[:, None]
        has, has_s = has_t & has_c[None, :], has_t & has_n[None, :]
        at = t * channels + c[None, :]
        x = _load(u + batch * u_b + t * u_l + c[None, :], has)
        raw = _load(delta + batch * delta_b + t * delta_l + c[None, :], has) + offset[None, :]
        b_t = _load(B + batch * B_b + t * B_l + n[None, :], has_s)
        c_t = _load(C + batch * C_b + t * C_l + n[None, :], has_s)
        gy = _load(g + origin + at, has)
        h = _load(starts + (batch * tiles + tile) * states * channels + cell, has_cell)
        dt = _step_sizes(raw, has, SOFTPLUS)
        fade = tl.exp2(dt[:, None, :] * decay[None, :, :])
        inputs = (dt * x)[:, None, :] * b_t[:, :, None]
        left = inputs  # row by row what is left of the state before: fade_t h_{t-1}
        for row in tl.static_range(TILE):
            rest = _row(fade, row) * h
            h = rest + _row(inputs, row)
            left = _with_row(left, row, rest)
        h_t = left + inputs
        if GATED:
            gate = _load(z + batch * z_b + t * z_l + c[None, :], has)
            sigmoid = _sigmoid(gate)
            y = tl.sum(h_t * c_t[:, :, None], axis=1) + skip * x
            _store(dz + origin + at, gy * y * sigmoid * (1.0 + gate * (1.0 - sigmoid)), has)
            gy = gy * gate * sigmoid
        shared = t * states + n[None, :]
        tl.store(dC + own + shared, tl.sum(gy[:, None, :] * h_t, axis=2), mask=has_s)
        # Loaded again: kept, the expanded rows would take 64 registers through all of the above.
        b_t = _load(B + batch * B_b + t * B_l + n[None, :], has_s)
        c_t = _load(C + batch * C_b + t * C_l + n[None, :], has_s)
        dh = gy[:, None, :] * c_t[:, :, None]  # row by row the gradients of the states
        for row in tl.static_range(TILE - 1, -1, -1):
            carry = _row(dh, row) + carry
            dh = _with_row(dh, row, carry)
            carry = _row(fade, row) * carry
        exponent = dh * left
        sum_A += tl.sum(exponent * dt[:, None, :], axis=0)
        fading = tl.sum(exponent * decay[None, :, :], axis=1) / LOG2_E
        d_input = tl.sum(dh * b_t[:, :, None], axis=1)  # gradient of dt x
        tl.store(dB + own + shared, tl.sum(dh * (dt * x)[:, None, :], axis=2), mask=has_s)
        # decay is A log2(e).
        d_dt = fading + d_input * x
        if SOFTPLUS:
            d_dt = d_dt * _sigmoid(raw)
        d_dt = tl.where(has, d_dt, 0.0)
        sum_D += tl.sum(gy * x, axis=0)
        sum_bias += tl.sum(d_dt, axis=0)
        _store(du + origin + at, d_input * dt + gy * skip, has)
        _store(d_delta + origin + at, d_dt, has)
    each = batch * spans + span
    tl.store(dA + each * states * channels + c[None, :] * states + n[:, None], sum_A, mask=has_cell)
    tl.store(dD + each * channels + c, sum_D, mask=has_c)
    tl.store(d_bias + each * channels + c, sum_bias, mask=has_c)
