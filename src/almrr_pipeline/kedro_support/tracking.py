"""Content of an MLflow run: flattened parameters, metrics, and the tags that tell runs apart."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import pandas as pd

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


class Experiment(NamedTuple):
    """What all stages with the same parameters, commit and name in DVC belong to.

    Attributes:
        name: DVC's, else the suite's with the beginning of the key.
        key: digest that all processes find alike.
    """

    name: str
    key: str

    @classmethod
    def of(cls, parameters: Mapping[str, Any], project: Path) -> Experiment:
        """The experiment of these values, as they are shown, and of the commit checked out."""
        named = os.environ.get("DVC_EXP_NAME")
        commit = (git_commit(project) or "").partition(" ")[0]
        text = json.dumps([named, commit, parameters], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        return cls(named or f"{parameters['suite']} {key[:7]}", key)

    def run_id(self, namespace: str = "") -> str:
        """Our id of its run, or of that of a category and seed."""
        return hashlib.sha256(f"{self.key} {namespace}".encode()).hexdigest()[:32]


def describe_dataset(name: str, manifest: pd.DataFrame) -> dict[str, str]:
    """A manifest as MLflow shows a data set: name, digest of all files, counts by split."""
    rows = manifest[["image", "sha256", "split", "label", "mask"]].astype(str)
    digest = hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()[:12]
    counts = (manifest["split"] + "/" + manifest["label"]).value_counts().sort_index()
    profile = json.dumps({"images": len(manifest), **counts.to_dict()})
    source = json.dumps({"uri": f"data/01_raw/{name}"})
    return {"name": name, "digest": digest, "profile": profile, "source": source}


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
