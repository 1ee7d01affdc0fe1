"""Arguments of a selective scan, as one tuple that every backend takes, and their gradients."""

# ruff: noqa: E741, N806 - names are those of the formulas
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScanOperands(NamedTuple):
    """Arguments of `selective_scan`, which documents their shapes, in its order."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    reverse: bool

    def check(self) -> None:
        """Raise ValueError for shapes that do not fit together."""
        if self.u.ndim != 3 or self.u.shape[1] == 0:
            raise ValueError(
                f"u must be (b, l, d) with at least one token, not {tuple(self.u.shape)}"
            )
        (b, l, d), n = self.u.shape, self.A.shape[-1]
        shapes = ((b, l, d), (d, n), (b, l, n), (b, l, n), (d,), (b, l, d), (d,))
        for name, given, shape in zip(self._fields[1:8], self[1:8], shapes, strict=True):
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(given.shape)}")


def gather_gradients(
    operands: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias from those that a fused kernel writes.

    Args:
        operands: the eight tensors.
        gradients: of u, delta and z (b, l, d); parts, to be summed, of A (parts, d, n), D and
            delta_bias (parts, d), B and C (blocks of channels, b, l, n). In that order.
    """
    du, d_delta, dA, dB, dC, dD, dz, d_bias = gradients
    sums = (du, d_delta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dz, d_bias.sum(0))
    pairs = zip(operands, sums, strict=True)
    return tuple(None if x is None else g.to(x.dtype).contiguous() for x, g in pairs)
