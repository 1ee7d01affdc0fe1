"""How batches share a CPU's cores: several at a time, each computed by few of torch's threads.

Two batches on one core each take less time than the two one after the other on both cores: torch's
operations are short, and what is serial in and between them leaves the other cores idle.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import torch

_MOST_AT_ONCE = 4  # batches that are computed at a time, which bounds the memory that they take
_changing = Lock()


def batches_at_once() -> int:
    """Batches to compute at a time on the CPU, within the threads that torch may use here."""
    return min(torch.get_num_threads(), _MOST_AT_ONCE)


def start_torch_workers(workers: int, *, threads: int) -> ThreadPoolExecutor:
    """Start threads, in each of which torch computes with `threads` threads; elsewhere as before.

    torch has that number twice: each thread its own, which counts, and one of the process, which
    threads take over at their first use of torch. `torch.set_num_threads` changes both, so one more
    thread, which has no use for a number of its own, sets the process's back. All is done before
    this returns: later no thread can take over the number of the workers.
    """
    executor, together = ThreadPoolExecutor(workers), Barrier(workers)

    def start(_: int) -> None:
        together.wait()  # each thread has one of these calls
        torch.get_num_threads()  # a first use, which would undo what is set before
        torch.set_num_threads(threads)

    with _changing, ThreadPoolExecutor(1) as keeper:
        usual = keeper.submit(torch.get_num_threads).result()
        list(executor.map(start, range(workers)))
        keeper.submit(torch.set_num_threads, usual).result()
    return executor
