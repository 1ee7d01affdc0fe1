"""Progress of long tasks: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_LONGEST_BETWEEN_LINES = 320.0  # to which it doubles: a training of minutes has few lines
_SECONDS_BETWEEN_SIGNS = 5.0


class Advance(Protocol):
    """Reports work just done; keyword values, such as loss=0.1, are shown next to the progress."""

    def __call__(self, amount: int, **shown: float | str) -> None: ...  # noqa: D102


@contextmanager
def track(total: int | None, *, unit: str, description: str, done: int = 0) -> Iterator[Advance]:
    """Show the progress of a task of `total` units, None if unknown.

    Bytes, unit "B", are shown as KiB, MiB, GiB; `done` is what an interrupted run has done before.

    Yields:
        A function that is called with the amount of work just done.
    """
    if not sys.stderr.isatty():
        yield _log_lines(total, unit=unit, description=description, done=done)
        return
    with tqdm(
        total=total,
        unit=unit,
        desc=description,
        initial=done,
        unit_scale=unit == "B",
        unit_divisor=1024,
        leave=False,
    ) as bar:

        def advance(amount: int, **shown: float | str) -> None:
            if shown:
                bar.set_postfix(shown, refresh=False)
            bar.update(amount)

        yield advance
        bar.refresh()  # the last amounts, which may have come faster than bars are drawn


def _log_lines(total: int | None, *, unit: str, description: str, done: int) -> Advance:
    begun, first = time.monotonic(), done
    pause = _SECONDS_BETWEEN_LINES
    next_line = begun + pause

    def advance(amount: int, **shown: float | str) -> None:
        nonlocal done, pause, next_line
        done += amount
        now = time.monotonic()
        if now < next_line:
            return
        pause = min(2 * pause, _LONGEST_BETWEEN_LINES)
        next_line = now + pause
        line = f"{description}: {format_amount(done, unit)}"
        if total:
            left = (now - begun) / max(1, done - first) * (total - done)
            line += f" ({100 * done / total:.0f} %), {tqdm.format_interval(left)} left"
        for name, value in shown.items():
            line += f", {name} {value if isinstance(value, str) else format(value, '.4g')}"
        logger.info("%s", line)

    return advance


@contextmanager
def report_waiting(task: str) -> Iterator[None]:
    """Log every few seconds for how long a task has run that cannot tell how far it is."""
    start, done = time.monotonic(), threading.Event()

    def report() -> None:
        while not done.wait(_SECONDS_BETWEEN_SIGNS):
            logger.info("%s: %.0f s so far.", task, time.monotonic() - start)

    logger.info("%s.", task)
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def format_amount(amount: int, unit: str) -> str:
    """Return an amount as text: bytes with a binary prefix, anything else as it is."""
    if unit != "B":
        return f"{amount} {unit}"
    size = float(amount)
    for prefix in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {prefix}"
        size /= 1024
    return f"{size:.4g} GiB"
