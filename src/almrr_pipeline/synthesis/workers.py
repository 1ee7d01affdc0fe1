"""Tasks spread over processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from almrr_pipeline.common.errors import AlmrrError

Spread = Callable[..., Iterator[int]]
"""Like the built-in `map`: calls a function on each task, yields the results in their order."""


def count_processes(requested: int, *, work: int, least_work: int) -> int:
    """Return how many processes to start: as requested, by default one per core of this process.

    There are fewer where less than `least_work` pieces of work remain for each.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min(requested or cores, work // least_work))


@contextmanager
def spread_over(processes: int) -> Iterator[Spread]:
    """Provide a `map` that works in so many processes, with 1 in this one.

    Processes are spawned: a fork copies the locks of libraries whose threads it does not copy. So
    functions and tasks have to be importable and picklable. An error in a task is raised here.

    Raises:
        AlmrrError: a process ended without an answer.
    """
    if processes == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, mp_context=spawn) as executor:
            yield executor.map
    except BrokenProcessPool as error:
        raise AlmrrError(
            f"One of {processes} processes ended without an answer, perhaps for lack of memory; "
            "set synthesis.workers to a smaller number (1 starts no further processes)."
        ) from error
