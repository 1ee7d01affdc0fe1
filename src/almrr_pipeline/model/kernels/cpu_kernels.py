"""CPU kernels: compiled by numba, distributed over the threads that torch may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

Array = npt.NDArray[np.float32]
_Function = TypeVar("_Function", bound=Callable[..., Any])
ANY_ORDER = frozenset({"contract", "reassoc", "nsz"})
"""LLVM's freedom with sums: any order, and fused multiply-add; infinities and NaN are kept."""

_OPTIONS: dict[str, Any] = {"fastmath": set(ANY_ORDER), "nogil": True, "error_model": "numpy"}


def compile_kernel(function: _Function) -> _Function:
    """Compile at the first call, with a cache on disk where a folder for it can be written."""
    try:
        compiled: _Function = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        compiled = njit(**_OPTIONS)(function)
    return compiled


def spread(kernel: Callable[..., None], tasks: int, *arguments: object) -> None:
    """Run `kernel(first, last, *arguments)` over all tasks, on as many threads as torch uses.

    The kernels release the interpreter's lock. Plain threads, not numba's own: those may abort the
    process when two Python threads start a kernel at once, as a server does.
    """
    count = max(1, min(torch.get_num_threads(), tasks))
    ends = [tasks * k // count for k in range(count + 1)]
    others = [
        _threads(os.getpid(), count - 1).submit(kernel, first, last, *arguments)
        for first, last in pairwise(ends[1:])
    ]
    kernel(ends[0], ends[1], *arguments)
    for other in others:
        other.result()


@lru_cache(maxsize=8)
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    """Threads that are kept between calls; a forked process needs its own."""
    return ThreadPoolExecutor(count, thread_name_prefix=f"almrr-kernel-{process}")
