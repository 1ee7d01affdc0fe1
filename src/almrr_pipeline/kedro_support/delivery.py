"""Delivery of an outbox to MLflow, by a thread: a tracker that is away delays that alone."""

from __future__ import annotations

import logging
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.redaction import redact_address
from almrr_pipeline.kedro_support.outbox import Event, Outbox, leftovers

logger = logging.getLogger(__name__)

MARK = "almrr.outbox"
"""Tag with our own id of a run: a request whose answer was lost is not repeated."""
_PATIENCE = 20.0  # seconds without progress that the end of a run waits for
_PATIENCE_WITH_FILES = 15.0  # times as long
_FILES = frozenset({"artifacts", "model"})
_RETRY = 15.0  # seconds between attempts, at most
_PROBE = 3.0  # seconds for an answer
_SQLITE = "sqlite:///"
_PARAMS = 100  # that MLflow takes in one request
_PASSING = frozenset({401, 403, 408, 429})  # client errors that another try may not meet
_GONE = 404
_DATABASE_SAYS = re.compile(r"^\([\w.]+Error\) (.{1,200})", re.MULTILINE)  # in SQLAlchemy's words


class TrackerAwayError(Exception):
    """The tracker does not answer; the message is the reason, without a full stop."""


class Connection(NamedTuple):
    """A tracker that answers."""

    client: MlflowClient
    experiment_id: str


class Delivery:
    """Delivers what dead processes have left, then an outbox while it is filled.

    Args:
        outbox: of this process, in the folder of all outboxes.
        address: of the tracker.
        connect: prepares the tracker; may raise anything.
    """

    def __init__(self, outbox: Outbox, address: str, connect: Callable[[], Connection]) -> None:
        self.outbox = outbox
        self.address = address
        self._connect = connect
        self._connection: Connection | None = None
        self._identity: tuple[int, int] | None = None  # of a database's file
        self._closing = threading.Event()
        self._stopped = threading.Event()
        self._warned = False
        self._swept = False
        self._thread = threading.Thread(target=self._run, name="mlflow delivery", daemon=True)

    def require(self) -> str | None:
        """Connect now; the reason, without a full stop, if that is not possible."""
        try:
            self._ensure_connection()
        except Exception as error:  # a tracker's client may raise anything
            return self._explain(error)
        return None

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def finish(self, patience: float = _PATIENCE) -> bool:
        """Wait while the tracker takes events, at most `patience` s for each; whether it has all.

        The outbox's file remains if it has not.
        """
        self._closing.set()
        box, waited_for = self.outbox, -1
        with box.changed:
            box.changed.notify_all()
            while not self._stopped.is_set() and len(box) != waited_for:
                waited_for = len(box)
                with_files = _FILES & {key for event in box.head()[:1] for key in event}
                seconds = patience * _PATIENCE_WITH_FILES if with_files else patience
                box.changed.wait_for(partial(self._has_moved, waited_for), seconds)
        if not self._stopped.is_set():
            self._warn(TrackerAwayError(f"it has not answered for {patience:g} seconds"))
        return not len(box)

    def deliver_now(self) -> int:
        """Deliver all that dead processes have left, in this thread; how many events.

        Raises:
            TrackerAwayError: the tracker does not answer.
        """
        try:
            self._ensure_connection()
            return self._sweep()
        except Exception as error:  # a tracker's client may raise anything
            raise TrackerAwayError(self._explain(error)) from error

    def find_page(self) -> str | None:
        """A sentence with the address of the runs in MLflow's pages; None if it knows none."""
        if self._connection is None:
            return None
        page = f"#/experiments/{self._connection.experiment_id}/runs?workflowType=machine_learning"
        if self.address.startswith(("http://", "https://")):
            return f"In MLflow: {redact_address(self.address).rstrip('/')}/{page}"
        command = f"mlflow ui --backend-store-uri {redact_address(shorten(self.address))}"
        return f"In MLflow: http://127.0.0.1:5000/{page} after `{command}`"

    def _has_moved(self, waited_for: int) -> bool:
        return self._stopped.is_set() or len(self.outbox) < waited_for

    def _run(self) -> None:
        delay = 1.0
        while True:
            closing = self._closing.is_set()
            try:
                self._ensure_connection()
                if not self._swept:
                    self._sweep()
                    self._swept = True
                self._empty(self.outbox)
                delay = 1.0
            except Exception as error:  # a tracker's client may raise anything
                self._warn(error)
                if not closing:
                    self._closing.wait(delay)
                    delay = min(2 * delay, _RETRY)
            if closing:  # this was the last attempt
                break
            with self.outbox.changed:
                self.outbox.changed.wait_for(lambda: len(self.outbox) or self._closing.is_set())
        if not len(self.outbox):
            self.outbox.remove()
        self._stopped.set()
        with self.outbox.changed:
            self.outbox.changed.notify_all()

    def _ensure_connection(self) -> None:
        """Check that the tracker answers, and connect if there is no connection yet."""
        if fault := find_fault(self.address):
            raise TrackerAwayError(fault)
        if self._connection is None:
            with _lock(self.outbox.path.parent):  # one process at a time can create a database
                self._connection = self._connect()
            self._identity = _identify(self.address)
        elif _identify(self.address) != self._identity:
            raise TrackerAwayError("its database was removed or replaced while the run went on")

    def _sweep(self) -> int:
        """Deliver what dead processes of this machine have left, and end their runs."""
        count = 0
        folder = self.outbox.path.parent
        for path in leftovers(folder):
            with _lock(folder):
                box = Outbox(path)
                if not path.exists():  # another process was first
                    continue
                ended = int(path.stat().st_mtime * 1000)
                for run in box.unfinished():
                    box.put({"run": run, "end": "KILLED", "time": ended})
                count += len(box)
                self._empty(box)
                box.remove()
        return count

    def _empty(self, box: Outbox) -> None:
        """Deliver an outbox's events."""
        rewound = False
        while events := box.head():
            try:
                self._send(box, events)
            except MlflowException as error:
                status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
                if status == _GONE and not rewound:
                    box.rewind()
                    rewound = True
                    continue
                if not 400 <= status < 500 or status in _PASSING:
                    raise
                logger.warning("MLflow refuses a part of a run: %s", _first_line(error))
            box.done(len(events))

    def _send(self, box: Outbox, events: list[Event]) -> None:
        assert self._connection is not None
        client, event, run = self._connection.client, events[0], events[0]["run"]
        if "start" in event:
            if run not in box.remotes:
                box.remember(run, event.get("existing") or self._create(box, event))
            return
        remote = self._find(box, run)
        if remote is None:  # of a process of which another has to deliver the start
            raise TrackerAwayError("it does not know yet the run that this process has joined")
        if "end" in event:
            client.set_terminated(remote, event["end"], event["time"])
        elif "metrics" in event:
            rows = [Metric(n, v, at, step) for each in events for n, v, step, at in each["metrics"]]
            client.log_batch(remote, metrics=rows)
        elif "dataset" in event:
            dataset = Dataset(source_type="local", **event["dataset"])
            context = InputTag("mlflow.data.context", event["context"])
            client.log_inputs(remote, [DatasetInput(dataset, [context])])
        elif _FILES & event.keys():
            try:
                self._send_files(remote, event)
            except requests.RequestException:
                raise
            except (AlmrrError, OSError) as error:  # of a disk: the rest of the run can go on
                reason = _first_fault(error)
                logger.warning("MLflow gets a part of a run's files alone: %s", reason)
        elif "tags" in event:
            client.log_batch(remote, tags=[RunTag(*item) for item in event["tags"].items()])
        else:
            params = [Param(*item) for item in event["params"].items()]
            for first in range(0, len(params), _PARAMS):
                client.log_batch(remote, params=params[first : first + _PARAMS])

    def _send_files(self, remote: str, event: Event) -> None:
        """Copy files to a run, or register a model; what is gone by now is left out."""
        assert self._connection is not None
        client, experiment = self._connection
        path = Path(event.get("artifacts") or event["model"])
        if not path.exists():
            logger.warning("MLflow gets no %s: it was removed before it could be sent.", path)
        elif "model" in event:
            from almrr_pipeline.inference.mlflow_model import register  # brings torch

            register(client, path, experiment, remote, name=event["name"], alias=event["alias"])
        else:
            for file in path.iterdir() if path.is_dir() else [path]:
                if file.suffix == ".webp":  # MLflow's pages do not show these
                    name = f"{event['to']}/{file.stem}.png"
                    client.log_image(remote, Image.open(file), artifact_file=name)
                else:
                    client.log_artifact(remote, str(file), event["to"] or None)

    def _create(self, box: Outbox, event: Event) -> str:
        """Create a run, or find the one that a request without an answer has created."""
        if not event.get("shared"):
            return self._find(box, event["run"]) or self._create_new(box, event)
        assert self._connection is not None
        with _lock(self.outbox.path.parent, "lock of shared runs"):  # of several processes
            if found := self._find(box, event["run"]):
                self._connection.client.update_run(found, status="RUNNING")
            return found or self._create_new(box, event)

    def _create_new(self, box: Outbox, event: Event) -> str:
        assert self._connection is not None
        client, experiment = self._connection
        tags = {**event["tags"], MARK: event["run"]}
        if parent := event.get("parent"):
            tags["mlflow.parentRunId"] = self._find(box, parent) or parent
        created = client.create_run(experiment, event["start"], tags, event["name"])
        return str(created.info.run_id)

    def _find(self, box: Outbox, run: str) -> str | None:
        """MLflow's id of a run by ours; None if it has no such run."""
        assert self._connection is not None
        client, experiment = self._connection
        if run not in box.remotes:
            found = client.search_runs([experiment], f"tags.\"{MARK}\" = '{run}'", max_results=1)
            if not found:
                return None
            box.remember(run, str(found[0].info.run_id))
        return box.remotes[run]

    def _explain(self, error: Exception) -> str:
        """The reason in a few words: what the tracker says now, else what the client has said."""
        if isinstance(error, TrackerAwayError):
            return str(error)
        return find_fault(self.address) or _first_line(error)

    def _warn(self, error: Exception) -> None:
        """One warning for a process, however often the tracker is away."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "MLflow at %s takes nothing now (%s); the run goes on, what it logs is kept in %s, "
                "and `almrr sync` or a later run delivers it.",
                redact_address(self.address), self._explain(error), self.outbox.path,
            )  # fmt: skip


def find_fault(address: str) -> str | None:
    """Why a tracker takes nothing now, without a full stop; None if it answers or cannot be asked.

    MLflow's own clients try for minutes.
    """
    if address.startswith(_SQLITE):
        return _find_fault_of_database(Path(address.removeprefix(_SQLITE).partition("?")[0]))
    if address.startswith(("http://", "https://")):
        try:
            answer = requests.get(f"{address.rstrip('/')}/health", timeout=_PROBE)
        except requests.RequestException as error:
            return f"it does not answer: {type(error).__name__}"
        if answer.status_code >= 500:
            return f"it answers with HTTP {answer.status_code}"
    return None


def _find_fault_of_database(path: Path) -> str | None:
    if not path.exists():
        return None if path.parent.is_dir() else f"there is no folder {path.parent}"
    try:
        connection = sqlite3.connect(path, timeout=_PROBE, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT * FROM sqlite_master")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        return f"{path.name}: {error}"
    except sqlite3.DatabaseError as error:
        return f"{path.name} is damaged: {error}; move it away"
    return None


def shorten(address: str) -> str:
    """A database's address, relative to the working directory if it is below that."""
    path = Path(address.removeprefix(_SQLITE))
    below = address.startswith(_SQLITE) and path.is_relative_to(Path.cwd())
    return f"{_SQLITE}{path.relative_to(Path.cwd())}" if below else address


def _identify(address: str) -> tuple[int, int] | None:
    if not address.startswith(_SQLITE):
        return None
    with suppress(OSError):
        found = Path(address.removeprefix(_SQLITE).partition("?")[0]).stat()
        return found.st_dev, found.st_ino
    return None


def _first_fault(error: Exception) -> str:
    """What an error says; of one for many files, what it says of the first."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list) and error.args[0]:
        return str(error.args[0][0][-1])
    return str(error)


def _first_line(error: Exception) -> str:
    """What an error says first; of a database's, what the database says."""
    if found := _DATABASE_SAYS.search(str(error)):
        return found[1].rstrip(".")
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


@contextmanager
def _lock(folder: Path, name: str = "lock") -> Iterator[None]:
    """Let one process of this machine at a time go on; where files cannot be locked, all."""
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("w")
    except (ImportError, OSError):
        yield
        return
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
