"""What runs stages side by side: processes of this machine, or tasks of a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import Parameters
from almrr_pipeline.kedro_support.worker import import_libraries, limit_threads, run_commands
from almrr_pipeline.scale.cluster import (
    check_sources,
    connected,
    passed_environment,
    prepare,
)

logger = logging.getLogger(__name__)

Engine: TypeAlias = Callable[[str, Sequence[str]], Future[None]]
"""Takes a stage's name and commands, and begins to run them."""
_OURS = re.compile(r"kedro run|python -m almrr_pipeline")
"""Commands for which a process imports torch, Kedro and MLflow."""
_ON_GPU = ("train", "evaluate", "baseline")
"""Stages that use a GPU where there is one."""
_FROM_SOURCES = ("settings", "fetch", "shared")
"""Stages that look at what images are fetched from."""


@contextmanager
def process_engine(project: Path, *, jobs: int) -> Iterator[Engine]:
    """Run in `jobs` processes that stay, and share this machine's cores.

    All start at the first stage of this package, and import while it runs, on which others wait.
    If the block raises they get SIGTERM, at which a training writes a checkpoint.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(jobs, spawn, limit_threads, (threads,))

    def submit(stage: str, commands: Sequence[str]) -> Future[None]:
        future = pool.submit(run_commands, stage, commands, project, {})
        if not begun and any(_OURS.match(command) for command in commands):
            begun.extend(pool.submit(import_libraries) for _ in range(jobs))
        return future

    begun: list[Future[None]] = []
    try:
        yield submit
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def ray_engine(project: Path, parameters: Parameters) -> Iterator[Engine]:
    """Run as tasks of a Ray cluster, which see the project's folder.

    A task whose process or machine dies is run again; a training goes on from its checkpoint.

    Raises:
        AlmrrError: see `almrr_pipeline.scale.cluster`.
    """
    with connected() as ray:
        share = prepare(ray, project, parameters.scale)
        data = parameters.anchored(project).data
        task = ray.remote(run_commands)

        def submit(stage: str, commands: Sequence[str]) -> Future[None]:
            kind = stage.partition("@")[0]
            if kind in _FROM_SOURCES:
                check_sources(ray, data)
            asked = task.options(
                name=stage,
                num_cpus=share.cpus,
                num_gpus=share.gpus if kind in _ON_GPU else 0,
                max_retries=parameters.scale.retries,
            )
            future: Future[None] = asked.remote(
                stage, commands, project, passed_environment()
            ).future()
            return future

        yield submit


def explain(error: Exception) -> str:
    """One sentence for what ended a unit of work."""
    cause = getattr(error, "cause", None) or error  # Ray wraps what a task raised
    if isinstance(cause, AlmrrError):
        return str(cause)
    if isinstance(error, BrokenExecutor):
        return "its process was killed, perhaps because memory ran out; take fewer --jobs"
    if type(error).__module__.startswith("ray."):
        return f"its process or machine died, and so at every retry ({type(error).__name__})"
    logger.error("%s", error, exc_info=error)
    return f"{type(error).__name__}: {error}"
