"""A tracker that dies, is locked, damaged or absent costs no result, and gets everything later."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from tracked_training import begin, end, wait_until_it_answers

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.kedro_support.delivery import _first_fault, _first_line
from almrr_pipeline.kedro_support.mlflow_hook import OUTBOXES
from almrr_pipeline.kedro_support.outbox import Outbox, metrics_event

STEPS, DIES_AT = 400, 5
OWN_RUNS = "SELECT status FROM runs WHERE name = 'train sample_brick.seed_0'"
"""Without those of the experiment and of the category, in which they are."""
CURVE = "SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY 1"


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """The project's configuration alone."""
    shutil.copytree(project / "conf", tmp_path / "conf")
    for name in ("params.yaml", "pyproject.toml"):
        shutil.copy(project / name, tmp_path)
    (tmp_path / "src").mkdir()
    return tmp_path


@contextmanager
def tracker(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`mlflow server` in a process group of its own, over server.db in the folder."""
    store = ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    files = ["--artifacts-destination", str(folder / "artifacts")]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--port",
        str(port),
        "--workers",
        "1",
        *store,
        *files,
    ]
    process = subprocess.Popen(command, cwd=folder, process_group=0)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(database: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


def test_a_tracker_that_dies_at_step_5_of_400_gets_all_curves_later_and_changes_no_weight(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    script, alone = Path(__file__).with_name("tracked_training.py"), copy / "undisturbed"
    with tracker(copy, port) as server:
        ended = subprocess.run(
            [sys.executable, script, copy, str(STEPS), str(server.pid), str(DIES_AT)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout
        assert server.wait(60) == -signal.SIGKILL
    assert " ".join(ended.stdout.split()).count("takes nothing now") == 1
    assert "Traceback" not in ended.stdout
    assert (copy / "history.csv").read_bytes() == (alone / "history.csv").read_bytes()
    undisturbed, weights = (torch.load(folder / "weights.pt") for folder in (alone, copy))
    assert all(map(torch.equal, undisturbed.values(), weights.values()))
    assert len(read(copy / "server.db", CURVE)) < DIES_AT

    with tracker(copy, port):
        wait_until_it_answers(os.environ["MLFLOW_TRACKING_URI"])
        synced = subprocess.run(
            [sys.executable, "-m", "almrr_pipeline", "sync"],
            cwd=copy, capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert "Delivered" in synced.stdout
    assert [*(copy / OUTBOXES).glob("*.jsonl")] == []
    history = pd.read_csv(copy / "history.csv", float_precision="round_trip")
    assert read(copy / "server.db", CURVE) == [*zip(history["step"], history["loss"], strict=True)]
    assert [*history["step"]] == [*range(1, STEPS + 1)]
    assert read(copy / "server.db", OWN_RUNS) == [("FINISHED",)]


def own_warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    ours = (each for each in caplog.records if each.name.startswith("almrr_pipeline"))
    return [each for each in ours if each.levelno >= logging.WARNING]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path / "mlflow.db"


def test_a_locked_database_is_one_warning_and_gets_all_in_a_later_run(
    copy: Path, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    end(begin(copy))  # makes the database
    with sqlite3.connect(database, isolation_level=None) as held:
        held.execute("BEGIN EXCLUSIVE")
        hook = begin(copy)
        hook.after_dataset_saved("sample_brick.seed_0.metrics", {"auroc": 0.5})
        end(hook)
        held.execute("ROLLBACK")
    assert len(own_warnings(caplog)) == 1
    assert "database is locked" in caplog.text
    (kept,) = (copy / OUTBOXES).glob("*.jsonl")
    kept.rename(kept.with_name(f"{socket.gethostname()}@{dead_process()}@0.jsonl"))
    end(begin(copy))
    assert read(database, "SELECT key, value FROM metrics") == [("auroc", 0.5)]
    assert read(database, OWN_RUNS) == [("FINISHED",)] * 3


def test_a_damaged_database_is_named_and_costs_no_run(
    copy: Path, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database.write_bytes(b"no database" * 1000)
    end(begin(copy))
    (warning,) = own_warnings(caplog)
    assert "mlflow.db is damaged" in warning.getMessage()
    (kept,) = (copy / OUTBOXES).glob("*.jsonl")
    assert len(Outbox(kept)) > 0


def test_a_run_whose_process_was_killed_ends_as_killed(copy: Path, database: Path) -> None:
    process = os.fork()
    if process == 0:
        hook = begin(copy)
        hook.delivery.outbox.put(metrics_event(hook.run_id, {"loss": 0.25}, 3))
        os.kill(os.getpid(), 9)
    os.waitpid(process, 0)
    end(begin(copy))
    assert sorted(read(database, OWN_RUNS)) == [("FINISHED",), ("KILLED",)]
    assert read(database, "SELECT key, value, step FROM metrics") == [("loss", 0.25, 3)]


def test_a_run_that_requires_a_tracker_stops_in_one_sentence(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    (copy / "conf/local").mkdir(exist_ok=True)
    (copy / "conf/local/tracking.yml").write_text("required: true")
    with pytest.raises(AlmrrError, match=r"MLflow at http://127.0.0.1:9 takes nothing now \(.*\)"):
        begin(copy)


def test_lines_that_a_death_has_cut_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "box.jsonl"
    path.write_text(json.dumps(metrics_event("a", {"x": 1.0})) + '\n{"run": "a", "metr')
    assert len(Outbox(path)) == 1


def test_an_outbox_on_a_disk_that_takes_nothing_still_delivers(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    box = Outbox(tmp_path / "file" / "box.jsonl")
    box.put(metrics_event("a", {"x": 1.0}))
    assert len(box.head()) == 1
    box.done(1)
    assert len(box) == 0


@pytest.mark.parametrize(
    "prefix",
    ["", "(raised as a result of Query-invoked autoflush; consider using a block)\n"],
)
def test_of_a_database_s_error_the_warning_has_what_the_database_says(prefix: str) -> None:
    error = MlflowException(
        f"{prefix}(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT INTO runs]"
    )
    assert _first_line(error) == "database or disk is full"


def test_of_many_files_that_a_full_disk_refuses_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    for name in "ab":
        (tmp_path / "from" / name).symlink_to(tmp_path / "absent")
    with pytest.raises(shutil.Error) as caught:
        shutil.copytree(tmp_path / "from", tmp_path / "to")
    assert _first_fault(caught.value).startswith("[Errno 2] No such file or directory: ")
