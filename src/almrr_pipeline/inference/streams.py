"""Work that runs a little ahead in threads, and items taken a batch at a time: lazy, in order, bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int, threads: int = 4
) -> Iterator[Result]:
    """Apply `function` in threads to at most `ahead` items beyond the one that is asked for; results keep the order.

    The items themselves are drawn in the caller's thread. What `function` raises is raised where its result is due.

    Args:
        function: called with one item; must be safe to call from several threads at once.
        items: may be endless; no more than `ahead` + 1 are ever in hand.
        ahead: how far to run ahead, at least 1.
        threads: how many calls run at the same time, at least 1.
    """
    source = iter(items)
    running: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(max_workers=min(threads, ahead))
    try:
        running.extend(pool.submit(function, item) for item in islice(source, ahead))
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(function, item) for item in islice(source, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def take_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items in turn; the last may be shorter, none is empty."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
