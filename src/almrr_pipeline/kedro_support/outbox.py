"""Outbox: what a run logs is in a local file before MLflow gets it, so that nothing can be lost.

A file holds the events of one process, a JSON object per line, and marks of what MLflow has. It is
removed when MLflow has all of it. A file whose process is dead is delivered by a later one, and its
unfinished runs end as KILLED: only files of this machine, whose processes can be looked up.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from almrr_pipeline.common.files import is_running

logger = logging.getLogger(__name__)

Event: TypeAlias = dict[str, Any]
"""`run`, an id of ours, and one of start (with name, parent and tags; shared, if several processes
may start it), params, tags, metrics (a list of name, value, step, time), dataset, artifacts (a path
whose files are read at delivery, and where they go), model (the same, and its names in the
registry), end (a status of MLflow's). Times are in ms since 1970."""
_MARKS = frozenset({"remote", "delivered"})
_LARGEST_BATCH = 1000
"""Metrics that MLflow takes in one request."""


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Outbox:
    """Events in their order, in memory and in a file; no method raises for a disk that fails.

    Args:
        path: the file; what it holds already is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed = threading.Condition()
        self.remotes: dict[str, str] = {}  # MLflow's ids by ours
        self._delivered = 0
        self._waiting: deque[Event] = deque()
        self._read()

    @classmethod
    def of_this_process(cls, folder: Path) -> Outbox:
        """A new file, named after the machine and the process."""
        name = f"{socket.gethostname()}@{os.getpid()}@{secrets.token_hex(4)}.jsonl"
        return cls(folder / name)

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, event: Event) -> None:
        """Add an event."""
        with self.changed:
            self._waiting.append(event)
            self._write(event)
            self.changed.notify_all()

    def head(self) -> list[Event]:
        """The next events that go together: metrics of one run, else one event; or none."""
        with self.changed:
            first: Event = self._waiting[0] if self._waiting else {}
            taken: list[Event] = []
            count = 0
            for event in self._waiting:
                count += len(event.get("metrics", ()))
                together = (
                    event["run"] == first["run"] and "metrics" in event and "metrics" in first
                )
                if taken and (not together or count > _LARGEST_BATCH):
                    break
                taken.append(event)
            return taken

    def done(self, count: int) -> None:
        """The first `count` events have been delivered; the file goes when all have."""
        with self.changed:
            for _ in range(count):
                self._waiting.popleft()
            self._delivered += count
            self._write({"delivered": self._delivered})
            self.changed.notify_all()

    def remember(self, run: str, remote: str) -> None:
        """Note the id that MLflow has given to a run."""
        with self.changed:
            self.remotes[run] = remote
            self._write({"run": run, "remote": remote})

    def rewind(self) -> None:
        """Deliver all again: the tracker has lost it, or is another one."""
        with self.changed:
            self._write({"delivered": 0})
            self._read()
            self.remotes.clear()

    def unfinished(self) -> list[str]:
        """The runs that have been started and not ended, children first."""
        runs: dict[str, None] = {}
        for event in self._stored():
            if "start" in event:
                runs[event["run"]] = None
            elif "end" in event:
                runs.pop(event["run"], None)
        return [*runs][::-1]

    def remove(self) -> None:
        """Remove the file, of which all has been delivered."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.info("%s could not be removed (%s).", self.path, error)

    def _write(self, line: Event) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # MLflow may still get it
            logger.info("%s could not be written (%s).", self.path, error)

    def _stored(self) -> Iterator[Event]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:  # cut by the death of its writer, or by a full disk
                continue
            if isinstance(event, dict) and ("delivered" in event or "run" in event):
                yield event

    def _read(self) -> None:
        stored = list(self._stored())
        events = [event for event in stored if not _MARKS & event.keys()]
        marks = [event for event in stored if _MARKS & event.keys()]
        self.remotes = {mark["run"]: mark["remote"] for mark in marks if "remote" in mark}
        self._delivered = 0
        for mark in marks:
            self._delivered = mark.get("delivered", self._delivered)
        self._waiting = deque(events[self._delivered :])


def leftovers(folder: Path) -> Iterator[Path]:
    """The files that dead processes of this machine have left."""
    mine = f"{socket.gethostname()}@"
    for path in sorted(folder.glob(f"{mine}*.jsonl")):
        number = path.name.split("@")[1]
        if number.isdecimal() and not is_running(int(number)):
            yield path


def metrics_event(run: str, values: Mapping[str, float], step: int = 0) -> Event:
    """Values of one step."""
    return {"run": run, "metrics": [[name, value, step, now()] for name, value in values.items()]}
