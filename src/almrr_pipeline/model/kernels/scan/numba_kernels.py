"""Fused CPU kernels of the selective scan and of the causal convolution before it, by numba.

A kernel runs the tasks `first` to `last`. A task is one image of the batch and one block of `BLOCK`
channels; tasks write to separate memory, so the result does not depend on the threads. Within a
task time is the outer loop, channels are the innermost one, and the state stays in the cache.

What keeps the innermost loops vectorized, and has to be kept when they are changed:
- the hot ones run over the constant BLOCK (a narrower last block has zeros in its unused lanes);
- they write at constant offsets into two or three arrays (`lanes` and `rows` below): LLVM does not
  vectorize where it would have to compare more than eight pairs of arrays at run time to know that
  they do not overlap;
- the exponential is a polynomial: multiplications, additions and one shift.
"""

# ruff: noqa: N803, N806, ANN401 - names are those of the formulas; numba's scalars have no Python type
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from almrr_pipeline.model.kernels.bits import (
    FRACTION_BITS,
    ONE_BITS,
    Bits,
    as_float32,
    as_integer,
    narrow,
    widen,
)
from almrr_pipeline.model.kernels.cpu_kernels import (
    ANY_ORDER,
    Array,
    compile_kernel,
    compile_part,
    make_part,
)

BLOCK = 64
"""Channels of a task: four registers of AVX-512, eight of AVX2, sixteen of NEON."""


class Rows(NamedTuple):
    """A tensor (b, l, channels) with contiguous channels: its storage, and the other strides.

    float32, or bfloat16, which becomes float32 where it is read.
    """

    values: Array | Bits
    by_image: int
    by_token: int


class ScanInputs(NamedTuple):
    """What both passes of a scan read; see `selective_scan`.

    A is (n, d) and in units of log2(e), so that a_t = 2^(delta_t A). Without a gate z is not read.
    """

    u: Rows
    delta: Rows
    B: Rows
    C: Rows
    z: Rows
    A: Array
    D: Array
    bias: Array
    length: int
    reverse: bool
    softplus: bool
    gated: bool


class ScanGradients(NamedTuple):
    """What the backward pass writes, flat; the shapes are those of `gather_gradients`."""

    u: Array | Bits
    delta: Array | Bits
    A: Array
    B: Array
    C: Array
    D: Array
    z: Array | Bits
    bias: Array


class ConvInputs(NamedTuple):
    """What both passes of the convolution read; weight is (taps, d), the last row for the token."""

    x: Rows
    weight: Array
    bias: Array
    length: int
    reverse: bool


_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
_LOG2_E = np.float32(np.log2(np.e))
_LN_2 = np.float32(np.log(2.0))
_TO_INTEGER = np.float32(1.5 * 2**23)  # a float32 this large has no fraction bits: adding it rounds
_LOWEST, _HIGHEST = np.float32(-126.0), np.float32(126.0)  # 2^x is normal and finite between them
# 2^r on [-1/2, 1/2], relative error 1.9e-9, and 2 atanh(s) / s in s^2 on [0, 1/9], 4.0e-9; both
# coefficients by Remez' algorithm.
_E1, _E2, _E3 = np.float32(6.93147206e-01), np.float32(2.40226469e-01), np.float32(5.55032878e-02)
_E4, _E5, _E6 = np.float32(9.61848896e-03), np.float32(1.33999312e-03), np.float32(1.53458120e-04)
_L0, _L1, _L2 = np.float32(2.00000001), np.float32(0.66666315), np.float32(0.4002491)
_L3, _L4 = np.float32(0.27960603), np.float32(0.28178335)


@compile_part
def _power_of_two(rounded: Any) -> Any:
    """2^k from the float32 k + _TO_INTEGER: moves k from the lowest bits to the exponent's."""
    return as_float32((as_integer(rounded) << FRACTION_BITS) + ONE_BITS)


@compile_part  # it subtracts what it has just added
def _exp2(x: Any) -> Any:
    """2^x to 1e-7; saturates at 2^-126 and 2^126, NaN stays NaN."""
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    rounded = x + _TO_INTEGER
    r = x - (rounded - _TO_INTEGER)
    p = (((((_E6 * r + _E5) * r + _E4) * r + _E3) * r + _E2) * r + _E1) * r + _ONE
    return p * _power_of_two(rounded)


@compile_part
def _sigmoid(x: Any) -> Any:
    return _ONE / (_ONE + _exp2(-_LOG2_E * x))


@compile_part
def _softplus(x: Any) -> Any:
    """log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|, with log(1 + e) = 2 atanh(e / (2 + e))."""
    e = _exp2(-_LOG2_E * abs(x))
    s = e / (_TWO + e)
    q = s * s
    return (x if x > _ZERO else _ZERO) + s * ((((_L4 * q + _L3) * q + _L2) * q + _L1) * q + _L0)


@compile_kernel
def scan_forward(first: int, last: int, inputs: ScanInputs, out: Array | Bits) -> None:
    """Write out (b, l, d), flat."""
    states, channels = inputs.A.shape
    lanes = np.empty(3 * BLOCK, np.float32)  # step size | step size x input | output
    rows = np.empty((states, 2 * BLOCK), np.float32)  # A | state
    for task in range(first, last):
        batch, start, width = _locate(task, channels)
        _begin(lanes, rows, inputs.A, start, width)
        for step in range(inputs.length):
            t = inputs.length - 1 - step if inputs.reverse else step
            _load(lanes, inputs, batch, t, start, width)
            lanes[2 * BLOCK :] = _ZERO
            B_t, C_t = _row(inputs.B, batch, t, 0, states), _row(inputs.C, batch, t, 0, states)
            for n in range(states):
                B_n, C_n, row = B_t[n], C_t[n], rows[n]
                for c in range(BLOCK):
                    h = row[BLOCK + c] * _exp2(lanes[c] * row[c]) + lanes[BLOCK + c] * B_n
                    row[BLOCK + c] = h
                    lanes[2 * BLOCK + c] += h * C_n
            at = (batch * inputs.length + t) * channels + start
            _skip_and_gate(out[at : at + width], lanes, inputs, batch, t, start, width)


@compile_kernel
def scan_backward(
    first: int, last: int, inputs: ScanInputs, g: Array | Bits,
    gradients: ScanGradients, scratch: Array,
) -> None:  # fmt: skip
    """Write the gradients for the gradient g (b, l, d) of the output.

    The states are computed again. `scratch` has room for `scratch_size` numbers, of any value.
    """
    states, channels = inputs.A.shape
    length = inputs.length
    lanes = np.empty(5 * BLOCK, np.float32)  # step size | x input | its gradient | exponent's | g
    rows = np.empty((states, 3 * BLOCK), np.float32)  # A | its gradient | the state's gradient
    ungated = scratch[: length * BLOCK].reshape((length, BLOCK))  # g before the gate, by step
    end = length * BLOCK + (length + 1) * states * BLOCK
    # The states before and after each step.
    history = scratch[length * BLOCK : end].reshape((length + 1, states, BLOCK))
    for task in range(first, last):
        batch, start, width = _locate(task, channels)
        _begin(lanes, rows, inputs.A, start, width)
        history[0] = _ZERO
        _remember(history, lanes, rows, inputs, batch, start, width)
        for step in range(length):
            t = length - 1 - step if inputs.reverse else step
            at = (batch * length + t) * channels + start
            _widen_row(ungated[step], g[at : at + width])
            if inputs.gated:
                dz_row = gradients.z[at : at + width]
                state = history[step + 1]
                _ungate(ungated[step], dz_row, state, lanes, inputs, batch, t, start, width)
        _walk_back(history, ungated, lanes, rows, inputs, gradients, task, batch, start, width)
        for n in range(states):
            at = (batch * states + n) * channels + start
            gradients.A[at : at + width] = rows[n, BLOCK : BLOCK + width]


def scratch_size(length: int, states: int) -> int:
    """Numbers of scratch memory of `scan_backward`: output gradients and states of all tokens."""
    return BLOCK * (length + (length + 1) * states)


@make_part(ANY_ORDER)
def _remember(
    history: Array, lanes: Array, rows: Array,
    inputs: ScanInputs, batch: int, start: int, width: int,
) -> None:  # fmt: skip
    """Run the recurrence forward and keep each state: history[step + 1] is the one after `step`."""
    states = inputs.A.shape[0]
    for step in range(inputs.length):
        t = inputs.length - 1 - step if inputs.reverse else step
        _load(lanes, inputs, batch, t, start, width)
        B_t = _row(inputs.B, batch, t, 0, states)
        for n in range(states):
            B_n, row, before, after = B_t[n], rows[n], history[step, n], history[step + 1, n]
            for c in range(BLOCK):
                after[c] = before[c] * _exp2(lanes[c] * row[c]) + lanes[BLOCK + c] * B_n


@make_part(ANY_ORDER)
def _ungate(
    g_row: Array, dz_row: Array | Bits, state: Array, lanes: Array,
    inputs: ScanInputs, batch: int, t: int, start: int, width: int,
) -> None:  # fmt: skip
    """Gradient of the gate, and, in place, the output's gradient before the gate."""
    states = inputs.A.shape[0]
    lanes[2 * BLOCK : 3 * BLOCK] = _ZERO
    C_t = _row(inputs.C, batch, t, 0, states)
    for n in range(states):
        C_n, row = C_t[n], state[n]
        for c in range(BLOCK):
            lanes[2 * BLOCK + c] += row[c] * C_n
    u_row = _row(inputs.u, batch, t, start, width)
    z_row = _row(inputs.z, batch, t, start, width)
    D_row = inputs.D[start : start + width]
    for c in range(width):
        z = widen(z_row[c])
        gate = _sigmoid(z)
        y = lanes[2 * BLOCK + c] + D_row[c] * widen(u_row[c])
        dz_row[c] = narrow(g_row[c] * y * gate * (_ONE + z * (_ONE - gate)), dz_row[c])
        g_row[c] *= z * gate


@make_part(ANY_ORDER)
def _walk_back(
    history: Array, ungated: Array, lanes: Array, rows: Array,
    inputs: ScanInputs, gradients: ScanGradients,
    task: int, batch: int, start: int, width: int,
) -> None:  # fmt: skip
    """Gradients of the recurrence and its inputs, from the last step to the first."""
    states, channels = inputs.A.shape
    length, images = inputs.length, gradients.D.size // channels
    for step in range(length - 1, -1, -1):
        t = length - 1 - step if inputs.reverse else step
        _load(lanes, inputs, batch, t, start, width)
        lanes[2 * BLOCK : 4 * BLOCK] = _ZERO
        lanes[4 * BLOCK : 4 * BLOCK + width] = ungated[step, :width]
        B_t, C_t = _row(inputs.B, batch, t, 0, states), _row(inputs.C, batch, t, 0, states)
        at = ((task % _blocks(channels) * images + batch) * length + t) * states
        dB_t, dC_t = gradients.B[at : at + states], gradients.C[at : at + states]
        for n in range(states):
            B_n, C_n, row = B_t[n], C_t[n], rows[n]
            before, after = history[step, n], history[step + 1, n]
            dB_n, dC_n = _ZERO, _ZERO
            for c in range(BLOCK):
                dC_n += lanes[4 * BLOCK + c] * after[c]
                dh = row[2 * BLOCK + c] + lanes[4 * BLOCK + c] * C_n
                dB_n += dh * lanes[BLOCK + c]
                lanes[2 * BLOCK + c] += dh * B_n
                dh *= _exp2(lanes[c] * row[c])
                row[2 * BLOCK + c] = dh  # the gradient of the state before
                dh *= before[c]
                row[BLOCK + c] += dh * lanes[c]
                lanes[3 * BLOCK + c] += dh * row[c]
            dB_t[n], dC_t[n] = dB_n, dC_n
        _store_gradients(lanes, inputs, gradients, batch, t, start, width)


@make_part(ANY_ORDER)
def _store_gradients(
    lanes: Array, inputs: ScanInputs, gradients: ScanGradients,
    batch: int, t: int, start: int, width: int,
) -> None:  # fmt: skip
    """Gradients of one token's u and delta, and its terms of those of D and of the bias."""
    channels = inputs.A.shape[1]
    at, sums_at = (batch * inputs.length + t) * channels + start, batch * channels + start
    u_row = _row(inputs.u, batch, t, start, width)
    delta_row = _row(inputs.delta, batch, t, start, width)
    du_row, d_delta_row = gradients.u[at : at + width], gradients.delta[at : at + width]
    D_row, bias_row = inputs.D[start : start + width], inputs.bias[start : start + width]
    dD_row = gradients.D[sums_at : sums_at + width]
    d_bias_row = gradients.bias[sums_at : sums_at + width]
    for c in range(width):
        du = lanes[2 * BLOCK + c] * lanes[c] + lanes[4 * BLOCK + c] * D_row[c]
        du_row[c] = narrow(du, du_row[c])
    for c in range(width):
        dD_row[c] += lanes[4 * BLOCK + c] * widen(u_row[c])
    for c in range(width):
        lanes[3 * BLOCK + c] = lanes[3 * BLOCK + c] * _LN_2 + lanes[2 * BLOCK + c] * widen(u_row[c])
    if inputs.softplus:
        for c in range(width):
            lanes[3 * BLOCK + c] *= _sigmoid(widen(delta_row[c]) + bias_row[c])
    for c in range(width):
        d_delta_row[c] = narrow(lanes[3 * BLOCK + c], d_delta_row[c])
    for c in range(width):
        d_bias_row[c] += lanes[3 * BLOCK + c]


@compile_kernel
def conv_forward(first: int, last: int, inputs: ConvInputs, out: Array | Bits) -> None:
    """Write the SiLU of the causal depthwise convolution, (b, l, d), flat."""
    channels = inputs.weight.shape[1]
    lanes = np.zeros(BLOCK, np.float32)
    for task in range(first, last):
        batch, start, width = _locate(task, channels)
        for t in range(inputs.length):
            _convolve(lanes, inputs, batch, t, start, width)
            at = (batch * inputs.length + t) * channels + start
            out_row = out[at : at + width]
            for c in range(width):
                out_row[c] = narrow(lanes[c] * _sigmoid(lanes[c]), out_row[c])


@compile_kernel
def conv_backward(
    first: int, last: int, inputs: ConvInputs, g: Array | Bits, dx: Array | Bits,
    d_weight: Array, d_bias: Array,
) -> None:  # fmt: skip
    """Write dx (b, l, d); add per image to d_weight (b, taps, d) and d_bias (b, d); all flat."""
    taps, channels = inputs.weight.shape
    lanes = np.zeros(BLOCK, np.float32)
    inner = np.zeros((inputs.length, BLOCK), np.float32)  # gradient before the SiLU
    for task in range(first, last):
        batch, start, width = _locate(task, channels)
        d_bias_row = d_bias[batch * channels + start : batch * channels + start + width]
        for t in range(inputs.length):
            _convolve(lanes, inputs, batch, t, start, width)
            at = (batch * inputs.length + t) * channels + start
            g_row, inner_row = g[at : at + width], inner[t]
            for c in range(width):
                gate = _sigmoid(lanes[c])
                inner_row[c] = widen(g_row[c]) * gate * (_ONE + lanes[c] * (_ONE - gate))
            for c in range(width):
                d_bias_row[c] += inner_row[c]
        for t in range(inputs.length):
            at = (batch * inputs.length + t) * channels + start
            dx_row, x_row = dx[at : at + width], _row(inputs.x, batch, t, start, width)
            lanes[:] = _ZERO
            for k in range(taps):
                distance = taps - 1 - k
                target = t - distance if inputs.reverse else t + distance  # its tap k is this one
                if 0 <= target < inputs.length:
                    at = (batch * taps + k) * channels + start
                    weight_row = inputs.weight[k, start : start + width]
                    d_weight_row = d_weight[at : at + width]
                    _spread_tap(lanes, d_weight_row, x_row, inner[target], weight_row)
            for c in range(width):
                dx_row[c] = narrow(lanes[c], dx_row[c])


@make_part(ANY_ORDER)
def _spread_tap(
    sums: Array, d_weight_row: Array, x_row: Array | Bits, inner_row: Array, weight_row: Array
) -> None:
    for c in range(d_weight_row.size):
        sums[c] += weight_row[c] * inner_row[c]
    for c in range(d_weight_row.size):
        d_weight_row[c] += inner_row[c] * widen(x_row[c])


@make_part(ANY_ORDER)
def _convolve(lanes: Array, inputs: ConvInputs, batch: int, t: int, start: int, width: int) -> None:
    """Put bias + sum over k of weight_k x_(t - taps + 1 + k) into the lanes."""
    taps = inputs.weight.shape[0]
    lanes[:width] = inputs.bias[start : start + width]
    for k in range(taps):
        distance = taps - 1 - k
        neighbor = t + distance if inputs.reverse else t - distance
        if 0 <= neighbor < inputs.length:
            x_row = _row(inputs.x, batch, neighbor, start, width)
            weight_row = inputs.weight[k, start : start + width]
            for c in range(width):
                lanes[c] += widen(x_row[c]) * weight_row[c]


@compile_part
def _blocks(channels: int) -> int:
    return (channels + BLOCK - 1) // BLOCK


@compile_part
def _locate(task: int, channels: int) -> tuple[int, int, int]:
    """Image, first channel and number of channels of a task."""
    start = task % _blocks(channels) * BLOCK
    return task // _blocks(channels), start, min(BLOCK, channels - start)


@compile_part
def _widen_row(out: Array, row: Array | Bits) -> None:
    for c in range(row.size):
        out[c] = widen(row[c])


@compile_part
def _row(rows: Rows, batch: int, t: int, start: int, width: int) -> Array | Bits:
    at = batch * rows.by_image + t * rows.by_token + start
    return rows.values[at : at + width]


@compile_part
def _begin(lanes: Array, rows: Array, A: Array, start: int, width: int) -> None:
    """Put A into the rows' first BLOCK, and zeros into all else."""
    lanes[:] = _ZERO
    rows[:] = _ZERO
    for n in range(A.shape[0]):
        rows[n, :width] = A[n, start : start + width]


@compile_part
def _load(lanes: Array, inputs: ScanInputs, batch: int, t: int, start: int, width: int) -> None:
    """Put a token's step sizes, and those times the input, into the lanes' first two BLOCKs."""
    delta_row = _row(inputs.delta, batch, t, start, width)
    u_row = _row(inputs.u, batch, t, start, width)
    bias_row = inputs.bias[start : start + width]
    for c in range(width):
        lanes[c] = widen(delta_row[c]) + bias_row[c]
    if inputs.softplus:
        for c in range(width):
            lanes[c] = _softplus(lanes[c])
    for c in range(width):
        lanes[BLOCK + c] = lanes[c] * widen(u_row[c])


@compile_part
def _skip_and_gate(
    out_row: Array | Bits, lanes: Array, inputs: ScanInputs,
    batch: int, t: int, start: int, width: int,
) -> None:  # fmt: skip
    """(y + D u) silu(z) of one token, y being in the third BLOCK of the lanes."""
    u_row, D_row = _row(inputs.u, batch, t, start, width), inputs.D[start : start + width]
    for c in range(width):
        lanes[2 * BLOCK + c] += D_row[c] * widen(u_row[c])
    if inputs.gated:
        z_row = _row(inputs.z, batch, t, start, width)
        for c in range(width):
            z = widen(z_row[c])
            lanes[2 * BLOCK + c] *= z * _sigmoid(z)
    for c in range(width):
        out_row[c] = narrow(lanes[2 * BLOCK + c], out_row[c])
