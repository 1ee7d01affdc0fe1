"""The selective scan as few tensor operations, for exported graphs: not unrolled over the tokens.

The sequence is cut into about sqrt(l) chunks of about sqrt(l) tokens. All chunks are scanned at
once, each from a state of zero; then the states at the chunks' ends are scanned, and what is left
of them is added inside the next chunk:

    h_t = (scan of t's chunk)_t + exp(A sum of delta from its start to t) h_(end of chunk before)

No division by a product of decays, which would overflow: every factor is in (0, 1]. For 256 tokens
these are 2 x 15 multiply-adds over a sixteenth of the states, at any batch size, instead of 256
steps.
"""

# ruff: noqa: N803, N806 - names are those of the formulas
from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.kernels.scan.operands import ScanOperands
from almrr_pipeline.model.kernels.scan.reference import (
    discretize_delta,
    skip_and_gate,
    widen,
    without_autocast,
)


def scan_in_parallel(scan: ScanOperands) -> Tensor:
    """`selective_scan` for exported graphs; the number of tokens must be static."""
    with without_autocast(scan.u):
        u, delta, A, B, C, D = (widen(tensor) for tensor in scan[:6])
        delta = discretize_delta(delta, scan)
        length, reverse = u.shape[1], scan.reverse
        chunk = 2 ** max(0, round(math.log2(length) / 2))
        steps = _cut(delta, chunk, reverse)  # (b, m, k, d)
        inputs = (steps * _cut(u, chunk, reverse)).unsqueeze(-1)  # (b, m, k, d, 1)
        increments = inputs * _cut(B, chunk, reverse).unsqueeze(3)  # (b, m, k, d, n)
        states = _scan_chunks(steps, A, increments, reverse=reverse)  # (b, m, k, d, n)
        y = torch.matmul(states, _cut(C, chunk, reverse).unsqueeze(-1)).squeeze(-1)  # (b, m, k, d)
        y = y.flatten(1, 2)  # (b, m k, d)
        y = y[:, y.shape[1] - length :] if reverse else y[:, :length]
        return skip_and_gate(y, u, D, scan.z).to(scan.u.dtype)


def _scan_chunks(steps: Tensor, A: Tensor, increments: Tensor, *, reverse: bool) -> Tensor:
    """States (b, m, k, d, n) of step sizes (b, m, k, d) and increments (b, m, k, d, n)."""
    inner = _recur(torch.exp(steps.unsqueeze(-1) * A), increments, dim=2, reverse=reverse)
    since_start = steps.flip(2).cumsum(2).flip(2) if reverse else steps.cumsum(2)
    # What is left at t of the state at the chunk's start.
    fade = torch.exp(since_start.unsqueeze(-1) * A)
    last = 0 if reverse else -1
    ends = _recur(fade[:, :, last], inner[:, :, last], dim=1, reverse=reverse)  # (b, m, d, n)
    rest = (0, 0, 0, 0, 0, 1) if reverse else (0, 0, 0, 0, 1, 0)
    starts = F.pad(ends[:, 1:] if reverse else ends[:, :-1], rest)
    return inner + fade * starts.unsqueeze(2)


def _recur(decay: Tensor, increments: Tensor, *, dim: int, reverse: bool) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along `dim`, all else in parallel."""
    factors, terms = torch.split(decay, 1, dim), torch.split(increments, 1, dim)
    order = range(len(terms) - 1, -1, -1) if reverse else range(len(terms))
    states: dict[int, Tensor] = {}
    state: Tensor | None = None
    for t in order:
        state = terms[t] if state is None else torch.addcmul(terms[t], factors[t], state)
        states[t] = state
    return torch.cat([states[t] for t in sorted(states)], dim)


def _cut(tensor: Tensor, chunk: int, reverse: bool) -> Tensor:
    """(b, l, ...) to (b, m, chunk, ...), padded with zeros where the scan ends."""
    missing = -tensor.shape[1] % chunk
    if missing:
        tensor = F.pad(tensor, (0, 0, missing, 0) if reverse else (0, 0, 0, missing))
    return tensor.reshape(tensor.shape[0], -1, chunk, tensor.shape[2])
