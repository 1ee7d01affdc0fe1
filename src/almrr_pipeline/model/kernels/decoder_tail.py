"""The decoder's end as two fused CPU kernels: instance norm, ReLU, bilinear resize, tanh, sum.

At the paper's widths the resized map has 4 million values per image, and each of the five
operations moves them through memory at least once. Here a value stays in a register from the resize
to the weighted sum. The map is given as the four phases of a transposed convolution of stride 2
(even or odd rows, even or odd columns), without interleaving them.

A kernel runs the tasks `first` to `last`, which write to separate memory; channels are contiguous
and the innermost loop, so that it is vectorized.
"""

# ruff: noqa: ANN401 - numba's scalars have no Python type
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from almrr_pipeline.common.arrays import Indices
from almrr_pipeline.model.kernels.cpu_kernels import Array, compile_kernel, spread

Maps = tuple[Array, Array, Array, Array]
"""The phases, flat: even rows and even columns, even and odd, odd and even, odd and odd."""
BLOCK = 64
"""Channels whose statistics are taken together: whole cache lines, few enough for the cache."""

_ZERO, _ONE, _SATURATED = np.float32(0.0), np.float32(1.0), np.float32(7.9)
# tanh(x) as x P(x^2) / Q(x^2) on [0, 7.9], above which it is 1; the coefficients are Eigen's and
# XLA's, error 2e-7.
_P1, _P3 = np.float32(4.89352455891786e-03), np.float32(6.37261928875436e-04)
_P5 = np.float32(1.48572235717979e-05)
_P7, _P9 = np.float32(5.12229709037114e-08), np.float32(-8.60467152213735e-11)
_P11, _P13 = np.float32(2.00018790482477e-13), np.float32(-2.76076847742355e-16)
_Q0, _Q2 = np.float32(4.89352518554385e-03), np.float32(2.26843463243900e-03)
_Q4, _Q6 = np.float32(1.18534705686654e-04), np.float32(1.19825839466702e-06)


def summarize_phases(
    phases: Sequence[Sequence[Tensor]], weight: Tensor, bias: Tensor,
    *, size: tuple[int, int], epsilon: float,
) -> Tensor:  # fmt: skip
    """Weighted sums over the channels of tanh(resize(relu(instance_norm(map)))).

    Args:
        phases: float32 on the CPU; `phases[i][j]` (B, C, n - i, m - j) has rows 2 y + i and columns
            2 x + j of the map.
        weight: (k, C).
        bias: (k,), added to the sums.
        size: rows and columns to resize to, bilinearly with align_corners=True.
        epsilon: added to the variance.

    Returns:
        (B, k, *size).
    """
    batch, channels, n, m = phases[0][0].shape
    maps = tuple(_flat(phase) for row in phases for phase in row)
    factors = np.empty((batch, channels), np.float32)
    offsets = np.empty((batch, channels), np.float32)
    tasks = batch * -(-channels // BLOCK)
    spread(measure_channels, tasks, n, m, maps, np.float32(epsilon), factors, offsets)
    out = torch.empty(batch, len(weight), *size)
    top, below = _positions(2 * n - 1, size[0])
    left, right = _positions(2 * m - 1, size[1])
    weights = weight.detach().contiguous().numpy()
    arguments = (factors, offsets, top, below, left, right, weights, bias.detach().numpy())
    spread(sum_channels, batch * size[0], n, m, maps, *arguments, out.numpy())
    return out


def _flat(phase: Tensor) -> Array:
    """The values of (B, C, n, m) as one row, channels innermost."""
    return phase.detach().permute(0, 2, 3, 1).contiguous().view(-1).numpy()


def _positions(length: int, size: int) -> tuple[Indices, Array]:
    """For each output position the input position before it, and the weight of the one after."""
    exact = np.arange(size) * ((length - 1) / max(size - 1, 1))
    before = np.minimum(exact.astype(np.int64), length - 2)
    return before, (exact - before).astype(np.float32)


@compile_kernel
def measure_channels(
    first: int, last: int, n: int, m: int, maps: Maps, epsilon: Any, factors: Array, offsets: Array
) -> None:  # fmt: skip
    """Factor and offset of instance norm per image and channel; a task is a block of channels."""
    channels = factors.shape[1]
    blocks = (channels + BLOCK - 1) // BLOCK
    cells = np.float32((2 * n - 1) * (2 * m - 1))
    lanes = np.empty(2 * BLOCK, np.float32)  # sum, then mean | sum of squares
    for task in range(first, last):
        image, start = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, channels - start)
        lanes[:] = _ZERO
        for phase in (0, 1, 2, 3):
            x = maps[phase]
            size = (n - phase // 2) * (m - phase % 2)
            for cell in range(size):
                at = (image * size + cell) * channels + start
                row = x[at : at + width]
                for c in range(width):
                    lanes[c] += row[c]
        for c in range(BLOCK):
            lanes[c] /= cells
        for phase in (0, 1, 2, 3):
            x = maps[phase]
            size = (n - phase // 2) * (m - phase % 2)
            for cell in range(size):
                at = (image * size + cell) * channels + start
                row = x[at : at + width]
                for c in range(width):
                    distance = row[c] - lanes[c]
                    lanes[BLOCK + c] += distance * distance
        for c in range(width):
            factor = _ONE / np.sqrt(lanes[BLOCK + c] / cells + epsilon)
            factors[image, start + c] = factor
            offsets[image, start + c] = -lanes[c] * factor


@compile_kernel
def sum_channels(
    first: int, last: int, n: int, m: int, maps: Maps, factors: Array, offsets: Array,
    top: Indices, below: Array, left: Indices, right: Array,
    weights: Array, bias: Array, out: Array,
) -> None:  # fmt: skip
    """Normalize, rectify, resize, tanh and sum; a task is a row of the output."""
    outputs, rows, columns = out.shape[1], out.shape[2], out.shape[3]
    channels = factors.shape[1]
    line = np.empty(
        (2 * m - 1, channels), np.float32
    )  # one row of the map, resized in the rows alone
    values = np.empty(channels, np.float32)
    for task in range(first, last):
        image, i = task // rows, task % rows
        factor, offset = factors[image], offsets[image]
        for x in range(2 * m - 1):
            upper = _cell(image, top[i], x, n, m, channels, maps)
            lower = _cell(image, top[i] + 1, x, n, m, channels, maps)
            _blend_rectified(line[x], upper, lower, factor, offset, below[i])
        for j in range(columns):
            _blend_and_saturate(values, line[left[j]], line[left[j] + 1], right[j])
            for k in range(outputs):
                total = _ZERO
                weight = weights[k]
                for c in range(channels):
                    total += weight[c] * values[c]
                out[image, k, i, j] = total + bias[k]


@compile_kernel
def _cell(image: int, y: int, x: int, n: int, m: int, channels: int, maps: Maps) -> Array:
    """The channels of row y and column x of the map, in their phase."""
    height, width = n - y % 2, m - x % 2
    at = ((image * height + y // 2) * width + x // 2) * channels
    return maps[y % 2 * 2 + x % 2][at : at + channels]


@compile_kernel
def _blend_rectified(
    out: Array, upper: Array, lower: Array, factor: Array, offset: Array, weight: Any
) -> None:
    """Both rows normalized and rectified, then interpolated with the weight of the lower one."""
    for c in range(len(out)):
        above = upper[c] * factor[c] + offset[c]
        under = lower[c] * factor[c] + offset[c]
        above = above if above > _ZERO else _ZERO
        under = under if under > _ZERO else _ZERO
        out[c] = above + weight * (under - above)


@compile_kernel
def _blend_and_saturate(out: Array, before: Array, after: Array, weight: Any) -> None:
    """Interpolated with the weight of the one after, then tanh of values that are not negative."""
    for c in range(len(out)):
        x = before[c] + weight * (after[c] - before[c])
        x = x if x < _SATURATED else _SATURATED
        s = x * x
        p = ((((((_P13 * s + _P11) * s) + _P9) * s + _P7) * s + _P5) * s + _P3) * s + _P1
        q = ((_Q6 * s + _Q4) * s + _Q2) * s + _Q0
        out[c] = x * p / q
