"""A tracker that dies, is locked, damaged or absent costs no result, and gets everything later."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import RUN, build_context
from kedro.io import DataCatalog
from kedro.pipeline import Node, Pipeline

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.kedro_support.mlflow_hook import OUTBOXES, TrackingHook
from almrr_pipeline.kedro_support.outbox import Outbox, metrics_event
from almrr_pipeline.kedro_support.tracking import live_logger

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from tiny_training import build_model, build_synthetic_set, train

STEPS, DIES_AT = 8, 5
NAMED = RUN | {"pipeline_names": ["train"], "namespaces": ["sample_brick.seed_0"]}
OWN_RUNS = "SELECT status FROM runs WHERE name = 'train sample_brick.seed_0'"
"""Without those of the experiment and of the category, in which they are."""
NODE = Node(
    lambda seed: seed, "params:seed", "model", name="train", namespace="sample_brick.seed_0"
)


class Tracker:
    """MLflow's own server over a database, in a thread; it can die and come back."""

    def __init__(self, database: Path) -> None:
        from mlflow.server import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR, app

        os.environ[BACKEND_STORE_URI_ENV_VAR] = f"sqlite:///{database}"
        os.environ[ARTIFACT_ROOT_ENV_VAR] = str(database.parent / "artifacts")
        os.environ["MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE"] = "true"
        self._app, self._server = app, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    def start(self) -> None:
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, self._app, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def die(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """The project's configuration alone."""
    shutil.copytree(project / "conf", tmp_path / "conf")
    shutil.copy(project / "params.yaml", tmp_path)
    return tmp_path


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracker]:
    started = Tracker(tmp_path / "server.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{started.port}")
    started.start()
    yield started
    started.die()


def build_hook(project: Path) -> TrackingHook:
    hook = TrackingHook()
    hook.after_context_created(build_context(project))
    return hook


def begin(project: Path) -> TrackingHook:
    hook = build_hook(project)
    hook.before_pipeline_run(NAMED, Pipeline([NODE]), DataCatalog())
    hook.before_node_run(NODE, DataCatalog(), {}, False)
    return hook


def end(hook: TrackingHook) -> None:
    hook.after_node_run(NODE)
    hook.after_pipeline_run(NAMED, Pipeline([NODE]), DataCatalog())


def read(database: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


def test_a_tracker_that_dies_in_a_training_gets_its_curves_later_and_changes_no_weight(
    copy: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"steps": STEPS, "log_every": 1, "batch_size": 2, "accelerator": "cpu"}
    undisturbed, model, samples = build_model(), build_model(), build_synthetic_set()
    history = train(undisturbed, samples, scratch=copy / "one", **settings)
    hook = begin(copy)
    log = live_logger()
    assert log is not None

    def log_and_let_the_tracker_die(step: int, values: Any) -> None:
        if step == DIES_AT:
            tracker.die()
        log(step, values)

    train(
        model, samples, scratch=copy / "other", on_metrics=log_and_let_the_tracker_die, **settings
    )
    end(hook)
    assert all(map(torch.equal, undisturbed.state_dict().values(), model.state_dict().values()))
    (warning,) = own_warnings(caplog)
    assert "takes nothing now" in warning.getMessage()
    assert warning.exc_info is None
    (kept,) = (copy / OUTBOXES).glob("*.jsonl")
    kept.rename(kept.with_name(f"{socket.gethostname()}@{dead_process()}@0.jsonl"))

    tracker.start()
    assert build_hook(copy).delivery.deliver_now() > 0
    assert [*(copy / OUTBOXES).glob("*.jsonl")] == []
    curve = read(
        copy / "server.db", "SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY 1"
    )
    assert history is not None
    assert curve == [*zip(history["step"].tolist(), history["loss"].tolist(), strict=True)]
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
