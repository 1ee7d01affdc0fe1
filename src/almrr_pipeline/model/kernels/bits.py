"""Bits of numbers in CPU kernels: float32 as integers, and bfloat16, which numba does not have."""

# ruff: noqa: ANN401 - numba's interface: `context` is its own, types are not Python's
from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from torch import Tensor

Bits = npt.NDArray[np.uint16]
"""Of bfloat16."""
FRACTION_BITS = np.int32(23)
"""Of a float32; above them are those of the exponent."""
ONE_BITS = np.int32(0x3F800000)
"""The bits of 1.0."""
_INTEGER = ir.IntType(32)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The kernels' view of a float32 or bfloat16 tensor on the CPU, the latter as `Bits`."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _as_integer(context: Any, value: Any) -> Any:
    return types.int32(types.float32), lambda _c, builder, _s, given: builder.bitcast(
        given[0], _INTEGER
    )


def _as_float32(context: Any, value: Any) -> Any:
    return types.float32(types.int32), lambda _c, builder, _s, given: builder.bitcast(
        given[0], ir.FloatType()
    )


def _widen(context: Any, value: Any) -> Any:
    if value == types.float32:
        return types.float32(value), lambda _c, _b, _s, given: given[0]

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        bits = builder.shl(builder.zext(given[0], _INTEGER), _INTEGER(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.uint16), generate


def _narrow(context: Any, value: Any, like: Any) -> Any:
    if like == types.float32:
        return types.float32(types.float32, like), lambda _c, _b, _s, given: given[0]

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        bits = builder.bitcast(given[0], _INTEGER)
        odd = builder.and_(builder.lshr(bits, _INTEGER(16)), _INTEGER(1))
        rounded = builder.add(bits, builder.add(odd, _INTEGER(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, _INTEGER(16)), ir.IntType(16))

    return types.uint16(types.float32, types.uint16), generate


as_integer: Any = intrinsic(_as_integer)
"""The bits of a float32 as int32."""
as_float32: Any = intrinsic(_as_float32)
"""The float32 that an int32 has the bits of."""
widen: Any = intrinsic(_widen)
"""The float32 of a float32 or, given by its bits, of a bfloat16."""
narrow: Any = intrinsic(_narrow)
"""`narrow(value, like)`: a float32 in the type of `like`, itself or the bits of a bfloat16.

Of the nearest one, ties to even. A NaN that arithmetic has made stays NaN: its last bits are zero.
"""
