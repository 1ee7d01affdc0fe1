"""Progress of things that take long: a bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def track(total: int | None, *, unit: str, description: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how far a task is.

    Args:
        total: amount of work, or None if nobody knows.
        unit: what is counted; "B" for bytes, shown as KiB, MiB, GiB.
        description: what is being done.
        done: work that was done before, by an interrupted run.

    Yields:
        A function that is called with the amount of work just done.
    """
    if not sys.stderr.isatty():
        yield _log_lines(total, unit=unit, description=description, done=done)
        return
    scaled = unit == "B"
    with tqdm(
        total=total, unit=unit, desc=description, initial=done, unit_scale=scaled, unit_divisor=1024, leave=False
    ) as bar:

        def advance(amount: int) -> None:
            bar.update(amount)

        yield advance


def _log_lines(total: int | None, *, unit: str, description: str, done: int) -> Callable[[int], None]:
    state = {"done": done, "next": time.monotonic() + _SECONDS_BETWEEN_LINES}

    def advance(amount: int) -> None:
        state["done"] += amount
        if time.monotonic() < state["next"]:
            return
        state["next"] = time.monotonic() + _SECONDS_BETWEEN_LINES
        share = f" ({100 * state['done'] / total:.0f} %)" if total else ""
        logger.info("%s: %s%s", description, show_amount(int(state["done"]), unit), share)

    return advance


def show_amount(amount: int, unit: str) -> str:
    """Return an amount for people: bytes with a binary prefix, anything else as it is."""
    if unit != "B":
        return f"{amount} {unit}"
    size = float(amount)
    for prefix in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {prefix}"
        size /= 1024
    return f"{size:.4g} GiB"
