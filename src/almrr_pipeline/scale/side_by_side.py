"""Units of work that need each other, as many at once as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import cache, partial
from graphlib import TopologicalSorter
from typing import TypeVar

Result = TypeVar("Result")


def run_side_by_side(
    needs: Mapping[str, Set[str]],
    start: Callable[[str], Future[Result] | None],
    finish: Callable[[str, Result], None],
    *,
    most: int | None = None,
) -> dict[str, Exception]:
    """Run every unit once all that it needs is finished; one failure leaves the others alone.

    `start` and `finish` are called in the caller's thread, one at a time. Of the units that could
    start, the one with the longest way behind it goes first.

    Args:
        needs: for each unit, the others that have to be finished before it starts.
        start: begins a unit; None if that has finished it.
        finish: takes what a unit's future gives.
        most: units that may run at once; None for any number.

    Returns:
        What the failed units raised, by unit. What needs one of them was not started.

    Raises:
        graphlib.CycleError: units need each other.
    """
    sorter = TopologicalSorter(needs)
    sorter.prepare()
    order = {unit: -height for unit, height in _heights(needs).items()}
    ready: list[str] = []
    running: dict[Future[Result], str] = {}
    failures: dict[str, Exception] = {}

    def take(unit: str, step: Callable[[], Future[Result] | None]) -> None:
        """Note a unit's future, its end, or what it raised."""
        try:
            future = step()
        except Exception as error:
            failures[unit] = error
            return
        if future is None:
            sorter.done(unit)
        else:
            running[future] = unit

    while True:
        ready = sorted([*ready, *sorter.get_ready()], key=order.__getitem__)
        if ready and (most is None or len(running) < most):
            unit = ready.pop(0)
            take(unit, partial(start, unit))
        elif running:
            future = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            unit = running.pop(future)
            take(unit, lambda: finish(unit, future.result()))  # noqa: B023 - called at once
        else:
            return failures


def _heights(needs: Mapping[str, Set[str]]) -> dict[str, int]:
    """The number of units on the longest way from each one to the end."""
    followers: dict[str, list[str]] = {unit: [] for unit in needs}
    for unit, needed in needs.items():
        for one in needed:
            followers.setdefault(one, []).append(unit)

    @cache
    def height(unit: str) -> int:
        return 1 + max(map(height, followers[unit]), default=0)

    return {unit: height(unit) for unit in followers}
