"""`almrr repro` on a project of shell commands, against `dvc repro`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.kedro_support.engines import Engine, process_engine
from almrr_pipeline.kedro_support.follow import LogFollower
from almrr_pipeline.kedro_support.repro import MEMORY, Outcome, choose_jobs, reproduce

STAGES = """\
stages:
  shared:
    cmd: echo shared > shared.txt
    outs: [shared.txt]
  train:
    matrix: {name: [a, b, c]}
    cmd: test ! -e fail_${item.name} && cat shared.txt in_${item.name}.txt > out_${item.name}.txt
    deps: [shared.txt, "in_${item.name}.txt"]
    outs: ["out_${item.name}.txt"]
  report:
    cmd: cat out_a.txt out_b.txt out_c.txt > all.txt
    deps: [out_a.txt, out_b.txt, out_c.txt]
    metrics: [{all.txt: {cache: false}}]
"""


def dvc(folder: Path, *words: str) -> str:
    """Run DVC's own command."""
    command = [sys.executable, "-m", "dvc", *words]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def engine_and_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Path]]:
    """Two processes and a project in which nothing has run, for all tests here."""
    folder = tmp_path_factory.mktemp("stages") / "project"
    folder.mkdir()
    (folder / "dvc.yaml").write_text(STAGES)
    for name in "abc":
        (folder / f"in_{name}.txt").write_text(f"{name}\n")
    dvc(folder, "init", "--no-scm", "-q")
    with process_engine(folder, jobs=2) as engine:
        yield engine, folder


def run(engine: Engine, folder: Path, *targets: str, **options: Any) -> Outcome:
    return reproduce(folder, engine, targets=targets, most=2, **options)


def test_outputs_and_record_are_those_of_dvc_repro(
    engine_and_project: tuple[Engine, Path], tmp_path: Path
) -> None:
    engine, folder = engine_and_project
    reference = tmp_path / "reference"
    shutil.copytree(folder, reference)
    dvc(reference, "repro", "-q")
    outcome = run(engine, folder)
    assert sorted(outcome.ran) == ["report", "shared", "train@a", "train@b", "train@c"]
    lock, expected = (yaml.safe_load((one / "dvc.lock").read_text()) for one in (folder, reference))
    assert lock == expected
    assert (folder / "all.txt").read_text() == (reference / "all.txt").read_text()
    assert "up to date" in dvc(folder, "status")
    assert run(engine, folder) == Outcome()


def test_only_stale_stages_run_and_a_failure_leaves_the_finished_recorded(
    engine_and_project: tuple[Engine, Path],
) -> None:
    engine, folder = engine_and_project
    run(engine, folder)
    for name in "bc":
        (folder / f"in_{name}.txt").write_text("new\n")
    (folder / "fail_b").touch()
    outcome = run(engine, folder)
    assert outcome.ran == ["train@c"]
    assert list(outcome.failed) == ["train@b"]
    assert "ended with 1" in outcome.failed["train@b"]
    assert outcome.skipped == ["report"]
    status = dvc(folder, "status")
    assert "train@b" in status
    assert "train@c" not in status
    (folder / "fail_b").unlink()
    assert run(engine, folder).ran == ["train@b", "report"]
    assert "up to date" in dvc(folder, "status")


def test_what_has_run_before_is_restored(engine_and_project: tuple[Engine, Path]) -> None:
    engine, folder = engine_and_project
    run(engine, folder)
    before = (folder / "in_a.txt").read_text()
    (folder / "in_a.txt").write_text("another\n")
    assert run(engine, folder, "train@a").ran == ["train@a"]
    (folder / "in_a.txt").write_text(before)
    outcome = run(engine, folder, "train@a")
    assert (outcome.ran, outcome.restored) == ([], ["train@a"])
    assert (folder / "out_a.txt").read_text().endswith(before)


def test_one_target_brings_what_it_needs_and_nothing_else(
    engine_and_project: tuple[Engine, Path],
) -> None:
    engine, folder = engine_and_project
    outcome = run(engine, folder, "train@c", force=True)
    assert outcome.ran == ["shared", "train@c"]


def test_a_target_that_does_not_exist_is_named(engine_and_project: tuple[Engine, Path]) -> None:
    engine, folder = engine_and_project
    with pytest.raises(AlmrrError, match="train@z"):
        run(engine, folder, "train@z")


def test_log_lines_are_passed_on_with_the_stage_and_a_failure_is_noted(
    engine_and_project: tuple[Engine, Path], tmp_path: Path
) -> None:
    engine, folder = engine_and_project
    said: list[str] = []
    with LogFollower(folder, said.append) as following:
        log = folder / ".almrr/logs/train@a.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("12:00:00 INFO    of an earlier run\n")
        following.begin("train@a")
        with log.open("a") as file:
            file.write("12:00:01 INFO    step 1\nTraceback\n12:00:02 WARNING slow\n12:00:03 IN")
        following.end("train@a")
    assert [line[9:] for line in said] == ["train@a: step 1", "train@a: WARNING slow"]
    log.unlink()
    said.clear()
    (folder / "fail_b").touch()
    run(engine, folder, "train@b", force=True, report=said.append)
    (folder / "fail_b").unlink()
    assert [line[9:] for line in said][-2:] == [
        "train@b: started, see .almrr/logs/train@b.log",
        "train@b: failed",
    ]


def test_jobs_follow_cores_memory_and_what_there_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    free = 100 * MEMORY
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(Path, "glob", lambda _folder, _pattern: iter(()))  # no GPU
    assert (choose_jobs(3), choose_jobs(9)) == (3, 4)
    free = 2.5 * MEMORY
    assert choose_jobs(9) == 2
    free = 0
    assert choose_jobs(9) == 1
    monkeypatch.setattr(Path, "glob", lambda _folder, _pattern: iter([Path("/dev/nvidia0")]))
    free = 100 * MEMORY
    assert choose_jobs(9) == 1
