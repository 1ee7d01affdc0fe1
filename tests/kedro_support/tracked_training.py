"""A training of the tiny network without a tracker, then one whose tracker dies in it.

python tracked_training.py FOLDER STEPS PROCESS STEP   kills a group of processes at a step's row
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import torch
from contexts import RUN, build_context
from kedro.io import DataCatalog
from kedro.pipeline import Node, Pipeline

from almrr_pipeline.kedro_support.mlflow_hook import TrackingHook
from almrr_pipeline.kedro_support.tracking import LogRow, live_logger

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from tiny_training import build_model, build_synthetic_set, train

NAMED = RUN | {"pipeline_names": ["train"], "namespaces": ["sample_brick.seed_0"]}
NODE = Node(
    lambda seed: seed, "params:seed", "model", name="train", namespace="sample_brick.seed_0"
)


def build_hook(project: Path) -> TrackingHook:
    """The hook as it is before a run."""
    hook = TrackingHook()
    hook.after_context_created(build_context(project))
    return hook


def begin(project: Path) -> TrackingHook:
    """Begin a run, as `kedro run` does for a training."""
    hook = build_hook(project)
    hook.before_pipeline_run(NAMED, Pipeline([NODE]), DataCatalog())
    hook.before_node_run(NODE, DataCatalog(), {}, False)
    return hook


def end(hook: TrackingHook) -> None:
    """End it."""
    hook.after_node_run(NODE)
    hook.after_pipeline_run(NAMED, Pipeline([NODE]), DataCatalog())


def wait_until_it_answers(address: str) -> None:
    """Wait for an MLflow server; TimeoutError after two minutes."""
    for _ in range(1200):
        with suppress(OSError), urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(0.1)
    raise TimeoutError("the MLflow server does not answer")


def train_once(folder: Path, steps: int, on_metrics: LogRow | None = None) -> None:
    """Train, and leave weights.pt and history.csv in the folder."""
    model = build_model(depth=1)
    history = train(
        model, build_synthetic_set(), scratch=folder / "scratch", batch_size=2, log_every=1,
        steps=steps, accelerator="cpu", on_metrics=on_metrics,
    )  # fmt: skip
    assert history is not None
    torch.save(model.state_dict(), folder / "weights.pt")
    history.to_csv(folder / "history.csv", index=False)


def main() -> None:
    """Train twice, in the folder `undisturbed` and in that above."""
    folder, (steps, process, last) = Path(sys.argv[1]), map(int, sys.argv[2:])
    (folder / "undisturbed").mkdir()
    train_once(folder / "undisturbed", steps)

    def log_after_the_death(step: int, values: Mapping[str, float]) -> None:
        if step == last:
            os.killpg(process, signal.SIGKILL)
        log(step, values)

    wait_until_it_answers(os.environ["MLFLOW_TRACKING_URI"])
    hook = begin(folder)
    log = live_logger()
    assert log is not None
    train_once(folder, steps, log_after_the_death)
    end(hook)


if __name__ == "__main__":
    main()
