"""How fused CPU kernels are compiled by numba, and spread over the threads that torch may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from numba import njit

_Function = TypeVar("_Function", bound=Callable[..., Any])
ANY_ORDER = frozenset({"contract", "reassoc", "nsz"})
"""What LLVM may do with sums: any order, and fused multiply-add. Infinities and NaN stay what they are."""

_OPTIONS: dict[str, Any] = {"fastmath": set(ANY_ORDER), "nogil": True, "error_model": "numpy"}


def compile_kernel(function: _Function) -> _Function:
    """Compile at the first call, with a cache on disk; without one where no folder for it can be written."""
    try:
        compiled: _Function = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        compiled = njit(**_OPTIONS)(function)
    return compiled


def spread(kernel: Callable[..., None], tasks: int, *arguments: object) -> None:
    """Run `kernel(first, last, *arguments)` over all tasks, shared out to as many threads as torch uses.

    The kernels release the interpreter's lock. Plain threads, not numba's own: those may abort the process when two
    Python threads start a kernel at once, as a server does.
    """
    shares = max(1, min(torch.get_num_threads(), tasks))
    ends = [tasks * share // shares for share in range(shares + 1)]
    others = [
        _threads(os.getpid(), shares - 1).submit(kernel, first, last, *arguments) for first, last in pairwise(ends[1:])
    ]
    kernel(ends[0], ends[1], *arguments)
    for other in others:
        other.result()


@lru_cache(maxsize=8)
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    """Waiting threads, kept from call to call; a forked process must not wait for its parent's."""
    return ThreadPoolExecutor(count, thread_name_prefix=f"almrr-kernel-{process}")
