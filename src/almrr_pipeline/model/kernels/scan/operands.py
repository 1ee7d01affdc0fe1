"""What a selective scan is given, as one tuple that every backend takes."""

# ruff: noqa: E741 - names are those of the formulas
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScanOperands(NamedTuple):
    """The arguments of `almrr_pipeline.model.kernels.scan.selective_scan`, where their shapes stand, in its order."""

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
            raise ValueError(f"u must be (b, l, d) with at least one token, not {tuple(self.u.shape)}")
        (b, l, d), n = self.u.shape, self.A.shape[-1]
        expected = {
            "delta": (b, l, d),
            "A": (d, n),
            "B": (b, l, n),
            "C": (b, l, n),
            "D": (d,),
            "z": (b, l, d),
            "delta_bias": (d,),
        }
        for name, shape in expected.items():
            given: Tensor | None = getattr(self, name)
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(given.shape)}")
