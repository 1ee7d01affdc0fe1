"""Content of an MLflow run: flattened parameters, metrics, and the tags that tell runs apart."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeAlias

LONGEST_VALUE = 500
"""MLflow's limit for the text of a parameter, which it refuses to exceed."""


def helps_another_process() -> bool:
    """Whether this is one of several processes of a distributed training, and not of rank 0.

    RANK is the global rank, set by torchrun, whose machines take their places in any order: that of
    SLURM_PROCID does not count then. Lightning's own launcher sets LOCAL_RANK and NODE_RANK.
    """
    own = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID", "NODE_RANK", "GROUP_RANK")
    return any(os.environ.get(rank, "0") != "0" for rank in (*own, "LOCAL_RANK"))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as `section.name: text`, cut to the length that MLflow takes."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = str(value)[:LONGEST_VALUE]
    return flat


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers at the top of a metrics.json, without what is undefined (null) or nested."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


LogRow: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Logs the values of a step; raises nothing, and may be called by any thread."""
live_run: ContextVar[LogRow | None] = ContextVar("live_run", default=None)
"""Of the node that this thread runs; set by the hook where the run is tracked."""


def live_logger() -> LogRow | None:
    """What logs a training step's losses to the run that is active now, if any."""
    return live_run.get()


def run_tags(project: Path, *, stage: str, category: str, seed: str) -> dict[str, str]:
    """Stage, category, seed, git commit and the name of DVC's experiment, where there is one."""
    commit = git_commit(project) or "unknown"
    tags = {"stage": stage, "category": category, "seed": seed, "git_commit": commit}
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc_experiment"] = experiment
    return tags


def git_commit(project: Path) -> str | None:
    """Commit that is checked out, with `with changes` where files differ; None outside of git.

    What a run itself writes does not count: dvc.lock and the headline figures.
    """
    revision = ["git", "rev-parse", "--short=12", "HEAD"]
    written = (":!dvc.lock", ":!data/08_reporting/headline.json")
    status = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *written]
    try:
        commit, changes = (
            subprocess.run(
                command, cwd=project, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (revision, status)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changes else commit
