"""CPU kernels: compiled by numba, distributed over the threads that torch may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
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


def compile_part(function: _Function) -> _Function:
    """Compile a function that only kernels call, whose order of additions is part of the formula.

    Fused multiply-add is free. Inlined without exception: a call would reach one of two copies,
    which round differently, by whether the kernel was compiled in this process or comes from the
    cache.
    """
    return make_part({"contract"})(function)


def make_part(fastmath: Iterable[str]) -> Callable[[_Function], _Function]:
    """`compile_part` with LLVM's freedoms `fastmath`; without entry points for Python and C."""
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    options["forceinline"] = True
    inner: Callable[[_Function], _Function] = njit(
        nogil=True, error_model="numpy", fastmath=set(fastmath), **options
    )
    return inner


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
