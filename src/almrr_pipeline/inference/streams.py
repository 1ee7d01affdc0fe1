"""Work that runs a little ahead in threads, and batches of a stream: lazy, in order, bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def submit_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    ahead: int,
    threads: int = 4,
    start: Callable[[int], ThreadPoolExecutor] = ThreadPoolExecutor,
) -> Iterator[tuple[Item, Future[Result]]]:
    """Apply `function` in threads to at most `ahead` items beyond the one that is being used.

    The items, which may be endless, are drawn in the caller's thread; no more than `ahead` + 1 are
    ever in hand. At most `threads` calls, one or more, run at the same time, in threads that
    `start` makes for their number.

    Yields:
        Each item with its finished future, in the order of the items.
    """
    remaining = iter(items)
    running: deque[tuple[Item, Future[Result]]] = deque()
    executor = start(min(threads, ahead))
    try:
        running.extend((item, executor.submit(function, item)) for item in islice(remaining, ahead))
        while running:
            head = running.popleft()
            head[1].exception()  # wait, so that no more than `ahead` are ever unfinished
            for item in islice(remaining, 1):
                running.append((item, executor.submit(function, item)))
            yield head
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def take_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Split a stream into lists of `size` items; the last may be shorter, none is empty."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
