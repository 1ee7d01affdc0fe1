"""Fused CPU kernels of the selective scan and of the causal convolution before it, compiled by numba.

A kernel works off the tasks `first` to `last`; a task is one picture of the batch and one block of `BLOCK` channels, so
that tasks share nothing that they write and the result does not depend on how they are spread over threads. Within a task
time is the outer loop, channels are the innermost one, and the state stays in the cache.

What keeps the inner loops vectorised, and must be kept in mind when they are changed:
- their length is the constant BLOCK (a narrower last block computes with zeros in the lanes that it lacks);
- all that a loop writes lies at constant offsets in two or three arrays (the rows of `lanes` and `rows` below): LLVM gives
  up when it would have to prove more than eight pairs of arrays distinct at run time;
- the exponential is a polynomial of our own, made of additions, multiplications and one shift.

Tensors come as their flat storage with the strides of picture and token (`Strides`); channels are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

BLOCK = 64
"""Channels of a task: four AVX-512 registers, or eight of AVX2, or sixteen of NEON."""

Array = npt.NDArray[np.float32]
Strides = tuple[int, int]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_EXACT = frozenset({"contract"})  # fused multiply-add only: _exp2 subtracts what it has just added
_SUMS = frozenset({"contract", "reassoc", "nsz"})  # and sums in any order; infinities and NaN stay what they are

_ONE, _ZERO, _TWO = np.float32(1.0), np.float32(0.0), np.float32(2.0)
_LOG2_E = np.float32(np.log2(np.e))
_LN_2 = np.float32(np.log(2.0))
_TO_INTEGER = np.float32(1.5 * 2**23)  # a float32 of this size has no bits behind the point: adding it rounds
_LOWEST, _HIGHEST = np.float32(-126.0), np.float32(126.0)  # 2^x is neither subnormal nor infinite in between
# 2^r on [-1/2, 1/2] (Remez, relative error 1.9e-9), and 2 atanh(s) / s in s^2 on [0, 1/9] (Remez, 4.0e-9)
_E1, _E2, _E3 = np.float32(6.93147206e-01), np.float32(2.40226469e-01), np.float32(5.55032878e-02)
_E4, _E5, _E6 = np.float32(9.61848896e-03), np.float32(1.33999312e-03), np.float32(1.53458120e-04)
_L0, _L1, _L2 = np.float32(2.00000001), np.float32(0.66666315), np.float32(0.4002491)
_L3, _L4 = np.float32(0.27960603), np.float32(0.28178335)


def _compiled(fastmath: frozenset[str]) -> Callable[[_Function], _Function]:
    """njit with a cache on disk, and without one where no folder for it can be written."""
    options: dict[str, Any] = {"fastmath": set(fastmath), "nogil": True, "error_model": "numpy"}

    def compile_function(function: _Function) -> _Function:
        try:
            compiled: _Function = njit(cache=True, **options)(function)
        except RuntimeError:  # numba: "no locator available"
            compiled = njit(**options)(function)
        return compiled

    return compile_function


@intrinsic  # type: ignore[untyped-decorator]
def _power_of_two(context: Any, rounded: Any) -> Any:
    """2^k from k + _TO_INTEGER: k lies in the float's lowest bits, and belongs into its exponent."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integer = ir.IntType(32)
        exponent = builder.shl(builder.bitcast(arguments[0], integer), integer(23))
        return builder.bitcast(builder.add(exponent, integer(0x3F800000)), ir.FloatType())

    return types.float32(types.float32), generate


@_compiled(_EXACT)
def _exp2(x: Any) -> Any:
    """2^x to 1e-7; saturates at 2^-126 and 2^126, NaN stays NaN."""
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    rounded = x + _TO_INTEGER
    r = x - (rounded - _TO_INTEGER)
    p = ((((((_E6 * r + _E5) * r) + _E4) * r + _E3) * r + _E2) * r + _E1) * r + _ONE
    return p * _power_of_two(rounded)


@_compiled(_EXACT)
def _sigmoid(x: Any) -> Any:
    return _ONE / (_ONE + _exp2(-_LOG2_E * x))


@_compiled(_EXACT)
def _softplus(x: Any) -> Any:
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), the logarithm by 2 atanh(e / (2 + e)): exact for small values too."""
    e = _exp2(-_LOG2_E * abs(x))
    s = e / (_TWO + e)
    q = s * s
    tail = ((((_L4 * q + _L3) * q) + _L2) * q + _L1) * q + _L0
    return (x if x > _ZERO else _ZERO) + s * tail


@_compiled(_EXACT)
def _load(
    lanes: Array, delta: Array, delta_at: int, bias: Array, u: Array, u_at: int, width: int, softplus: bool
) -> None:
    """Fill lanes [0, BLOCK) with the step sizes and [BLOCK, 2 BLOCK) with step size times input."""
    delta_row = delta[delta_at : delta_at + width]
    u_row = u[u_at : u_at + width]
    for c in range(width):
        lanes[c] = delta_row[c] + bias[c]
    if softplus:
        for c in range(width):
            lanes[c] = _softplus(lanes[c])
    for c in range(width):
        lanes[BLOCK + c] = lanes[c] * u_row[c]


@_compiled(_SUMS)
def scan_forward(
    first: int, last: int, length: int, channels: int, states: int, reverse: bool, softplus: bool, gated: bool,
    u: Array, u_by: Strides, delta: Array, delta_by: Strides, A: Array, B: Array, B_by: Strides, C: Array, C_by: Strides,
    D: Array, bias: Array, z: Array, z_by: Strides, out: Array,
) -> None:  # fmt: skip
    """out (b, l, d); A (n, d) is given in units of log2(e): a_t = 2^(delta_t A)."""
    blocks = (channels + BLOCK - 1) // BLOCK
    lanes = np.empty(3 * BLOCK, np.float32)  # step size | step size x input | output
    rows = np.empty((states, 2 * BLOCK), np.float32)  # A | state
    for task in range(first, last):
        batch, start = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, channels - start)
        lanes[:] = _ZERO
        rows[:] = _ZERO
        for n in range(states):
            rows[n, :width] = A[n, start : start + width]
        for step in range(length):
            t = length - 1 - step if reverse else step
            u_at = batch * u_by[0] + t * u_by[1] + start
            delta_at = batch * delta_by[0] + t * delta_by[1] + start
            _load(lanes, delta, delta_at, bias[start : start + width], u, u_at, width, softplus)
            lanes[2 * BLOCK :] = _ZERO
            B_at, C_at = batch * B_by[0] + t * B_by[1], batch * C_by[0] + t * C_by[1]
            for n in range(states):
                B_n, C_n, row = B[B_at + n], C[C_at + n], rows[n]
                for c in range(BLOCK):
                    h = row[BLOCK + c] * _exp2(lanes[c] * row[c]) + lanes[BLOCK + c] * B_n
                    row[BLOCK + c] = h
                    lanes[2 * BLOCK + c] += h * C_n
            out_at = (batch * length + t) * channels + start
            out_row, u_row, D_row = out[out_at : out_at + width], u[u_at : u_at + width], D[start : start + width]
            for c in range(width):
                out_row[c] = lanes[2 * BLOCK + c] + D_row[c] * u_row[c]
            if gated:
                z_at = batch * z_by[0] + t * z_by[1] + start
                z_row = z[z_at : z_at + width]
                for c in range(width):
                    out_row[c] *= z_row[c] * _sigmoid(z_row[c])


@_compiled(_SUMS)
def scan_backward(
    first: int, last: int, length: int, channels: int, states: int, reverse: bool, softplus: bool, gated: bool,
    u: Array, u_by: Strides, delta: Array, delta_by: Strides, A: Array, B: Array, B_by: Strides, C: Array, C_by: Strides,
    D: Array, bias: Array, z: Array, z_by: Strides, g: Array,
    du: Array, d_delta: Array, dz: Array, dA: Array, dB: Array, dC: Array, dD: Array, d_bias: Array,
) -> None:  # fmt: skip
    """Gradients for the gradient g (b, l, d) of the output; nothing of the forward pass has to be kept.

    du, d_delta, dz: (b, l, d). dA (b, n, d), dD and d_bias (b, d) are still to be summed over the batch; dB and dC
    (blocks, b, l, n) over the blocks of channels.
    """
    blocks = (channels + BLOCK - 1) // BLOCK
    lanes = np.empty(5 * BLOCK, np.float32)  # step size | times input | its gradient | exponent's gradient | g
    rows = np.empty((states, 3 * BLOCK), np.float32)  # A | dA | gradient of the state
    history = np.empty((length + 1, states, BLOCK), np.float32)  # the state before each step, and after the last
    ungated = np.empty((length, BLOCK), np.float32)  # g before the gate
    pictures = du.size // (length * channels)
    for task in range(first, last):
        batch, start = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, channels - start)
        D_row, bias_row = D[start : start + width], bias[start : start + width]
        lanes[:] = _ZERO
        rows[:] = _ZERO
        history[0] = _ZERO
        for n in range(states):
            rows[n, :width] = A[n, start : start + width]
        for step in range(length):
            t = length - 1 - step if reverse else step
            u_at = batch * u_by[0] + t * u_by[1] + start
            delta_at = batch * delta_by[0] + t * delta_by[1] + start
            _load(lanes, delta, delta_at, bias_row, u, u_at, width, softplus)
            B_at = batch * B_by[0] + t * B_by[1]
            for n in range(states):
                B_n, row, before, after = B[B_at + n], rows[n], history[step, n], history[step + 1, n]
                for c in range(BLOCK):
                    after[c] = before[c] * _exp2(lanes[c] * row[c]) + lanes[BLOCK + c] * B_n
            at = (batch * length + t) * channels + start
            g_row, ungated_row = g[at : at + width], ungated[step]
            for c in range(width):
                ungated_row[c] = g_row[c]
            if gated:
                lanes[2 * BLOCK : 3 * BLOCK] = _ZERO
                C_at = batch * C_by[0] + t * C_by[1]
                for n in range(states):
                    C_n, after = C[C_at + n], history[step + 1, n]
                    for c in range(BLOCK):
                        lanes[2 * BLOCK + c] += after[c] * C_n
                z_at = batch * z_by[0] + t * z_by[1] + start
                z_row, u_row, dz_row = z[z_at : z_at + width], u[u_at : u_at + width], dz[at : at + width]
                for c in range(width):
                    gate = _sigmoid(z_row[c])
                    y = lanes[2 * BLOCK + c] + D_row[c] * u_row[c]
                    dz_row[c] = g_row[c] * y * gate * (_ONE + z_row[c] * (_ONE - gate))
                    ungated_row[c] *= z_row[c] * gate
        dD_row = dD[batch * channels + start : batch * channels + start + width]
        d_bias_row = d_bias[batch * channels + start : batch * channels + start + width]
        for step in range(length - 1, -1, -1):
            t = length - 1 - step if reverse else step
            u_at = batch * u_by[0] + t * u_by[1] + start
            delta_at = batch * delta_by[0] + t * delta_by[1] + start
            _load(lanes, delta, delta_at, bias_row, u, u_at, width, softplus)
            lanes[2 * BLOCK : 4 * BLOCK] = _ZERO
            lanes[4 * BLOCK : 4 * BLOCK + width] = ungated[step, :width]
            B_at, C_at = batch * B_by[0] + t * B_by[1], batch * C_by[0] + t * C_by[1]
            sums_at = ((task % blocks * pictures + batch) * length + t) * states
            for n in range(states):
                B_n, C_n, row = B[B_at + n], C[C_at + n], rows[n]
                before, after = history[step, n], history[step + 1, n]
                sum_B, sum_C = _ZERO, _ZERO
                for c in range(BLOCK):
                    sum_C += lanes[4 * BLOCK + c] * after[c]
                    dh = row[2 * BLOCK + c] + lanes[4 * BLOCK + c] * C_n
                    sum_B += dh * lanes[BLOCK + c]
                    lanes[2 * BLOCK + c] += dh * B_n
                    dh *= _exp2(lanes[c] * row[c])
                    row[2 * BLOCK + c] = dh
                    dh *= before[c]
                    row[BLOCK + c] += dh * lanes[c]
                    lanes[3 * BLOCK + c] += dh * row[c]
                dB[sums_at + n] = sum_B
                dC[sums_at + n] = sum_C
            at = (batch * length + t) * channels + start
            u_row, delta_row = u[u_at : u_at + width], delta[delta_at : delta_at + width]
            du_row, d_delta_row = du[at : at + width], d_delta[at : at + width]
            for c in range(width):
                du_row[c] = lanes[2 * BLOCK + c] * lanes[c] + lanes[4 * BLOCK + c] * D_row[c]
                d_delta_row[c] = lanes[3 * BLOCK + c] * _LN_2 + lanes[2 * BLOCK + c] * u_row[c]
                dD_row[c] += lanes[4 * BLOCK + c] * u_row[c]
            if softplus:
                for c in range(width):
                    d_delta_row[c] *= _sigmoid(delta_row[c] + bias_row[c])
            for c in range(width):
                d_bias_row[c] += d_delta_row[c]
        for n in range(states):
            at = (batch * states + n) * channels + start
            dA[at : at + width] = rows[n, BLOCK : BLOCK + width]


@_compiled(_SUMS)
def conv_forward(
    first: int, last: int, length: int, channels: int, reverse: bool,
    x: Array, x_by: Strides, weight: Array, bias: Array, out: Array,
) -> None:  # fmt: skip
    """SiLU of the causal depthwise convolution; weight (width, d), its last row for the token itself."""
    blocks = (channels + BLOCK - 1) // BLOCK
    lanes = np.zeros(2 * BLOCK, np.float32)  # sum | a row of x
    for task in range(first, last):
        batch, start = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, channels - start)
        for t in range(length):
            _convolve(lanes, batch, t, length, start, width, reverse, x, x_by, weight, bias)
            at = (batch * length + t) * channels + start
            out_row = out[at : at + width]
            for c in range(width):
                out_row[c] = lanes[c] * _sigmoid(lanes[c])


@_compiled(_SUMS)
def conv_backward(
    first: int, last: int, length: int, channels: int, reverse: bool,
    x: Array, x_by: Strides, weight: Array, bias: Array, g: Array, dx: Array, d_weight: Array, d_bias: Array,
) -> None:  # fmt: skip
    """dx (b, l, d); d_weight (b, width, d) and d_bias (b, d) are still to be summed over the batch."""
    blocks = (channels + BLOCK - 1) // BLOCK
    taps = weight.shape[0]
    lanes = np.zeros(2 * BLOCK, np.float32)
    inner = np.zeros((length, BLOCK), np.float32)  # gradient before the SiLU
    for task in range(first, last):
        batch, start = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, channels - start)
        d_bias_row = d_bias[batch * channels + start : batch * channels + start + width]
        for t in range(length):
            _convolve(lanes, batch, t, length, start, width, reverse, x, x_by, weight, bias)
            at = (batch * length + t) * channels + start
            g_row, inner_row = g[at : at + width], inner[t]
            for c in range(width):
                gate = _sigmoid(lanes[c])
                inner_row[c] = g_row[c] * gate * (_ONE + lanes[c] * (_ONE - gate))
                d_bias_row[c] += inner_row[c]
        for t in range(length):
            at = (batch * length + t) * channels + start
            dx_row = dx[at : at + width]
            x_at = batch * x_by[0] + t * x_by[1] + start
            x_row = x[x_at : x_at + width]
            for k in range(taps):
                target = t - (taps - 1 - k) if reverse else t + (taps - 1 - k)  # whose tap k is this token
                if 0 <= target < length:
                    inner_row = inner[target]
                    weight_row = weight[k, start : start + width]
                    at = (batch * taps + k) * channels + start
                    d_weight_row = d_weight[at : at + width]
                    for c in range(width):
                        dx_row[c] += weight_row[c] * inner_row[c]
                        d_weight_row[c] += inner_row[c] * x_row[c]


@_compiled(_SUMS)
def _convolve(
    lanes: Array, batch: int, t: int, length: int, start: int, width: int, reverse: bool,
    x: Array, x_by: Strides, weight: Array, bias: Array,
) -> None:  # fmt: skip
    """Put bias + sum over k of weight_k x_(t - taps + 1 + k) into lanes [0, BLOCK)."""
    taps = weight.shape[0]
    bias_row = bias[start : start + width]
    for c in range(width):
        lanes[c] = bias_row[c]
    for k in range(taps):
        source = t + (taps - 1 - k) if reverse else t - (taps - 1 - k)
        if 0 <= source < length:
            at = batch * x_by[0] + source * x_by[1] + start
            x_row, weight_row = x[at : at + width], weight[k, start : start + width]
            for c in range(width):
                lanes[c] += x_row[c] * weight_row[c]
