"""`almrr repro`: what DVC finds stale, side by side, recorded as `dvc repro` does."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, chdir, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]
from dvc.exceptions import DvcException
from dvc.repo import Repo, lock_repo
from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro
from dvc.rwlock import rwlock
from dvc.stage.cache import RunCacheNotFoundError

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import load_parameters
from almrr_pipeline.kedro_support.config_loader import project_root
from almrr_pipeline.kedro_support.engines import Engine, explain, process_engine, ray_engine
from almrr_pipeline.kedro_support.follow import LogFollower
from almrr_pipeline.kedro_support.worker import LOGS
from almrr_pipeline.scale.side_by_side import run_side_by_side

logger = logging.getLogger(__name__)

MEMORY = 3e9
"""Bytes of free memory for each process; the sample suite's trainings take half of them."""


@dataclass
class Outcome:
    """Names of stages: run, restored from DVC's run cache, failed with the reason, not reached."""

    ran: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def reproduce(
    project: Path,
    engine: Engine,
    *,
    targets: Sequence[str] = (),
    most: int | None = None,
    force: bool = False,
    report: Callable[[str], None] = logger.info,
) -> Outcome:
    """Run the stale stages, and record each in dvc.lock, DVC's cache and its run cache.

    Whether a stage is stale is asked when all that it needs is finished, as `dvc repro` asks. This
    process alone reads and writes DVC's records; the engine only runs commands.

    Args:
        project: its root.
        engine: runs a stage's commands.
        targets: stages, as for `dvc repro`, which bring those that they need; none for all.
        most: stages that may run at once; None leaves it to the engine.
        force: run all, stale or not.
        report: takes lines: the beginning and the end of each stage, and what it logs.

    Raises:
        AlmrrError: there is no DVC project, or a target is none of its stages.
    """
    logging.getLogger("dvc").setLevel(logging.WARNING)  # one line for each write of dvc.lock
    try:
        following = LogFollower(project, report)
        # DVC takes targets from the working directory.
        with chdir(project), Repo(str(project)) as repo, following:
            return _Reproduction(repo, engine, following, force=force).run(targets, most)
    except DvcException as error:
        raise AlmrrError(f"DVC: {error}.") from error


def reproduce_project(
    targets: Sequence[str],
    *,
    jobs: int | None,
    engine: Literal["processes", "ray"],
    force: bool,
    report: Callable[[str], None],
) -> None:
    """Run what is stale in the project around the working directory, and report it in lines.

    Args:
        targets: stages; none for all.
        jobs: processes; None for `choose_jobs`.
        engine: where the stages run.
        force: run all, stale or not.
        report: takes lines of text.

    Raises:
        AlmrrError: stages failed, all of which are named; or as `reproduce` and `ray_engine` raise.
    """
    project = project_root()
    parameters = load_parameters(project / "params.yaml")
    runs = len(parameters.categories) * len(parameters.seeds)
    jobs = jobs or choose_jobs(runs)
    chosen = (
        ray_engine(project, parameters) if engine == "ray" else process_engine(project, jobs=jobs)
    )
    most = None if engine == "ray" else jobs
    with _ending_at_sigterm(), chosen as run_commands:
        outcome = reproduce(
            project, run_commands, targets=targets, most=most, force=force, report=report
        )
    report(f"{len(outcome.ran)} stages run, {len(outcome.restored)} restored from the run cache.")
    if outcome.failed:
        lines = [f"{name}: {reason}" for name, reason in outcome.failed.items()]
        lost = f"; not run, as they need one: {', '.join(outcome.skipped)}" * bool(outcome.skipped)
        heading = f"{len(lines)} stages failed, all others that could run are recorded{lost}:"
        raise AlmrrError("\n  ".join([heading, *lines]))


def choose_jobs(runs: int) -> int:
    """Processes for so many categories and seeds, by the cores, the free memory and the GPUs.

    At most one on each GPU, whose memory they would share.
    """
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no such file, or "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))  # of a container
    fitting = int(free / MEMORY)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return max(1, min(os.cpu_count() or 1, runs, fitting, gpus or runs))


@contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, so that processes are ended too."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Reproduction:
    def __init__(self, repo: Repo, engine: Engine, following: LogFollower, *, force: bool) -> None:
        self._repo, self._engine, self._following, self._force = repo, engine, following, force
        self._stages: dict[str, Any] = {}
        self._locks: dict[str, ExitStack] = {}
        self._outcome = Outcome()

    def run(self, targets: Sequence[str], most: int | None) -> Outcome:
        """Run what the targets need."""
        graph = get_active_graph(self._repo.index.graph)
        chosen = collect_stages(self._repo, targets or ["dvc.yaml"])
        self._stages = {stage.addressing: stage for stage in plan_repro(graph, chosen)}
        needs = {
            name: {needed.addressing for needed in graph.successors(stage)}
            for name, stage in self._stages.items()
        }
        settled: set[str] = set()

        def start(name: str) -> Future[None] | None:
            future = self._start(self._stages[name])
            if future is None:
                settled.add(name)
            return future

        def finish(name: str, _: None) -> None:
            self._finish(self._stages[name])
            settled.add(name)

        try:
            failures = run_side_by_side(needs, start, finish, most=most)
        finally:
            for lock in self._locks.values():
                lock.close()
        for name, error in failures.items():
            self._outcome.failed[name] = explain(error)
        self._outcome.skipped = [name for name in needs if name not in settled | failures.keys()]
        return self._outcome

    def _start(self, stage: Any) -> Future[None] | None:  # noqa: ANN401 - DVC is not typed
        """Begin a stale stage; None where nothing has to run (any more)."""
        name = stage.addressing
        with lock_repo(self._repo), self._repo.scm_context(quiet=True):
            if not self._force and not stage.changed():
                return None
            if stage.frozen or stage.is_import or not stage.cmd:
                stage.reproduce(force=self._force)
                stage.dump(update_pipeline=False)
                return None
            stage.remove_outs()
            if not self._force and self._restore(stage):
                self._record(stage)
                self._outcome.restored.append(name)
                self._following.say(name, "restored from the run cache")
                return None
            stage.save_deps()
        self._locks[name] = self._lock(stage)
        self._following.say(name, f"started, see {LOGS / name}.log")
        self._following.begin(name)
        commands = [stage.cmd] if isinstance(stage.cmd, str) else list(stage.cmd)
        future = self._engine(name, commands)
        future.add_done_callback(lambda done: self._note_failure(name, done))
        return future

    def _note_failure(self, name: str, future: Future[None]) -> None:
        if future.cancelled() or future.exception():
            self._following.end(name)
            self._following.say(name, "failed")

    def _finish(self, stage: Any) -> None:  # noqa: ANN401
        name = stage.addressing
        seconds = self._following.end(name)
        self._locks.pop(name).close()
        with lock_repo(self._repo), self._repo.scm_context(quiet=True):
            self._record(stage)
        self._outcome.ran.append(name)
        self._following.say(name, f"finished after {seconds:.0f} s")

    def _restore(self, stage: Any) -> bool:  # noqa: ANN401
        """Take the outputs of an earlier run with equal inputs, if DVC has kept them."""
        try:
            self._repo.stage_cache.restore(stage)
        except RunCacheNotFoundError:
            return False
        return True

    def _record(self, stage: Any) -> None:  # noqa: ANN401
        kept = all(out.use_cache or out.is_metric or out.is_plot for out in stage.outs)
        stage.save(run_cache=kept)
        stage.commit()
        stage.dump(update_pipeline=False)

    def _lock(self, stage: Any) -> ExitStack:  # noqa: ANN401
        """Keep other commands of DVC from the stage's files while it runs."""
        repo, command = self._repo, f"almrr repro {stage.addressing}"
        read, write = ([one.fs_path for one in each] for each in (stage.deps, stage.outs))
        hardlink = repo.config["core"].get("hardlink_lock", False)
        lock = ExitStack()
        lock.enter_context(rwlock(repo.tmp_dir, repo.fs, command, read, write, hardlink))
        return lock
