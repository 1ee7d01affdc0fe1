"""Array types shared by all packages, and large arrays that need no memory of their own."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

ImageArray = npt.NDArray[np.uint8]  # RGB image, uint8 in [0, 255], shape (H, W, 3)
MaskArray = npt.NDArray[np.bool_]  # ground truth, True where anomalous, shape (H, W)
AnomalyMap = npt.NDArray[np.float32]
"""Anomaly scores of an image's pixels, float32 in [0, 1], shape (H, W)."""
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

_LARGE = 300_000_000  # bytes


def allocate(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array whose values are still to be written.

    Beyond 300 MB it is mapped from a temporary file without a name, if the disk has room for it,
    so that `release_pages` can take it out of memory.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size > _LARGE and hasattr(os, "posix_fallocate"):
        with suppress(OSError), tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk would end the process later
            return np.asarray(np.memmap(file, dtype=dtype, mode="r+", shape=shape))
    return np.empty(shape, dtype=dtype)


def release_pages(array: npt.NDArray[Any]) -> None:
    """Take an array of `allocate` out of memory if it is mapped from a file; it stays readable."""
    base: Any = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    if isinstance(base, np.memmap) and base.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        base._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def return_free_memory(array: npt.NDArray[Any]) -> None:
    """After work on a large array, give the system back what malloc keeps (glibc alone does)."""
    if array.nbytes > _LARGE and sys.platform == "linux":
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
