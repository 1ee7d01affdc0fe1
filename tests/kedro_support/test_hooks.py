"""Tracking of a training that several processes do together, as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from contexts import RUN, build_context
from kedro.io import DataCatalog
from kedro.pipeline import Node, Pipeline

from almrr_pipeline.kedro_support.hooks import ProjectHook

ONE_MACHINE = [
    {"RANK": "0", "GROUP_RANK": "0", "LOCAL_RANK": "0"},
    {"RANK": "1", "GROUP_RANK": "0", "LOCAL_RANK": "1"},
]
TWO_MACHINES = [
    {"RANK": "0", "GROUP_RANK": "0", "LOCAL_RANK": "0"},
    {"RANK": "1", "GROUP_RANK": "1", "LOCAL_RANK": "0"},
]


def _train(seed: int) -> int:
    return seed


def track_a_run(project: Path, ranks: dict[str, str]) -> None:
    """What Kedro calls of the hook around a run, in a process with these ranks."""
    os.environ |= ranks
    context = build_context(project)
    node = Node(_train, "params:seed", "model", name="train", namespace="sample_brick.seed_0")
    pipeline, catalog = Pipeline([node]), DataCatalog()
    named = {"pipeline_names": ["train"], "namespaces": ["sample_brick.seed_0"]}
    manager = context._hook_manager
    manager.register(ProjectHook())
    hook = manager.hook
    hook.after_context_created(context=context)
    hook.before_pipeline_run(run_params=RUN | named, pipeline=pipeline, catalog=catalog)
    hook.before_node_run(node=node, catalog=catalog, inputs={}, is_async=False)
    hook.after_node_run(node=node)
    hook.after_dataset_saved(dataset_name="sample_brick.seed_0.metrics", data={"auroc": 0.5})
    hook.after_pipeline_run(run_params=RUN | named, pipeline=pipeline, catalog=catalog)


@pytest.mark.parametrize("processes", [ONE_MACHINE, TWO_MACHINES])
def test_processes_that_train_together_make_one_run_in_a_fresh_database(
    project: Path, tmp_path: Path, processes: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    shutil.copytree(project / "conf", tmp_path / "conf")
    shutil.copy(project / "params.yaml", tmp_path)
    fork = multiprocessing.get_context("fork")  # spares each the import of MLflow
    started = [fork.Process(target=track_a_run, args=(tmp_path, ranks)) for ranks in processes]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("SELECT name, status FROM runs").fetchall()
        stages = ("train sample_brick.seed_0", "sample_brick.seed_0")
        assert sorted(runs)[-2:] == [(name, "FINISHED") for name in sorted(stages)]
        assert len(runs) == 3  # and that of the experiment
        assert database.execute("SELECT key, value FROM metrics").fetchall() == [("auroc", 0.5)]
