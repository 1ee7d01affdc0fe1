"""What stages print into their logs, passed on while they run."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, strftime
from typing import Self

from almrr_pipeline.kedro_support.worker import LOGS

_LINE = re.compile(r"[\d:]{8} (?:INFO|(WARNING|ERROR|CRITICAL)) *(.+)")  # by conf/logging.yml
_PAUSE = 0.5  # seconds between two looks at the logs
_QUIET = 20.0  # seconds after which the running stages are named
_LONGEST_QUIET = 320.0  # to which it doubles


class LogFollower:
    """Reports the lines of running stages, each with the time and the stage's name.

    Only whole lines of logging are passed on, no tracebacks. If nothing was reported for a while,
    the running stages are named.

    Args:
        project: its root.
        report: takes a line; may be called from another thread, one call at a time.
    """

    def __init__(self, project: Path, report: Callable[[str], None]) -> None:
        self._folder, self._report = project / LOGS, report
        self._places: dict[str, int] = {}  # bytes of a running stage's log that are passed on
        self._begun: dict[str, float] = {}
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._quiet, self._last = _QUIET, monotonic()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        """Begin to follow."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Pass on what is left."""
        self._ended.set()
        self._thread.join()
        self._pass_on()

    def say(self, stage: str, text: str) -> None:
        """Report a line of one's own on a stage."""
        with self._lock:
            self._last = monotonic()
            self._report(f"{strftime('%H:%M:%S')} {stage}: {text}")

    def begin(self, stage: str) -> None:
        """Follow a stage from here on."""
        log = self._log(stage)
        with self._lock:
            self._places[stage] = log.stat().st_size if log.exists() else 0
            self._begun[stage] = monotonic()

    def end(self, stage: str) -> float:
        """Follow a stage no longer; returns the seconds since its beginning."""
        with self._lock:
            self._pass_on()
            del self._places[stage]
            return monotonic() - self._begun.pop(stage)

    def _log(self, stage: str) -> Path:
        return self._folder / f"{stage}.log"

    def _follow(self) -> None:
        while not self._ended.wait(_PAUSE):
            self._pass_on()
            with self._lock:
                if self._begun and monotonic() - self._last > self._quiet:
                    self._quiet = min(2 * self._quiet, _LONGEST_QUIET)
                    named = (
                        f"{stage} ({monotonic() - begun:.0f} s)"
                        for stage, begun in self._begun.items()
                    )
                    self.say("running", ", ".join(named))

    def _pass_on(self) -> None:
        with self._lock:
            for stage, place in self._places.items():
                if not (log := self._log(stage)).exists():
                    continue
                with log.open("rb") as file:
                    file.seek(place)
                    lines = file.read().rpartition(b"\n")[0]
                self._places[stage] += len(lines) + bool(lines)
                for line in lines.decode(errors="replace").splitlines():
                    if found := _LINE.match(line):
                        self.say(stage, f"{found[1]} {found[2]}" if found[1] else found[2])
