"""Trains the tiny model in several processes.

Some die on the way, one for each of DEATHS; two take part in one distributed training, and two more
in one that ends early. Not a test: run once by the fixture `processes`. Prints how each process
ended (the exit status, or minus the signal's number) as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_training import DEATHS, SETTINGS, TOGETHER, build_model, build_synthetic_set, train

from almrr_pipeline.training import train as training
from almrr_pipeline.training.features import FeatureCache
from almrr_pipeline.training.train import TrainingInterrupted


def train_and_die(scratch: Path, *, row: int = 0, checkpoint: int = 0, by: str = "SIGKILL") -> None:
    """Train until a row of the history, or the middle of writing a checkpoint; then die."""

    def die_at_the_row(step: int, values: Mapping[str, float]) -> None:
        if step == row:
            os.kill(os.getpid(), signal.Signals[by])

    if checkpoint:
        die_in_the_middle_of_writing(checkpoint)
    train(
        build_model(standardize=True),
        build_synthetic_set(),
        scratch=scratch,
        on_metrics=die_at_the_row,
        **SETTINGS,
    )


def die_in_the_middle_of_writing(which: int) -> None:
    """Let the process be killed when half of a checkpoint is on the disk."""
    written = 0
    sync = os.fsync

    def kill_instead(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written == which:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = kill_instead


def train_together(folder: Path, *, rank: int, port: int) -> None:
    """Train as one of two processes; leave weights, reported steps, limits of kept features."""
    appear_started_by_torchrun(rank=rank, port=port)
    model = build_model(drop_path=0.0)
    limits: list[float] = []

    def keep_features(*arguments: Any, limit: float, **named: Any) -> FeatureCache:
        limits.append(limit)
        return FeatureCache(*arguments, limit=limit, **named)

    vars(training)["FeatureCache"] = keep_features
    reported: list[int] = []
    settings = {**SETTINGS, **TOGETHER, "devices": 2}
    try:
        history = train(
            model,
            build_synthetic_set(),
            scratch=folder / "scratch",
            on_metrics=lambda step, _: reported.append(step),
            **settings,
        )
        if history is not None:
            history.to_csv(folder / f"history_{rank}.csv", index=False)
    finally:
        left = {"weights": model.state_dict(), "reported": reported, "limits": limits}
        torch.save(left, folder / f"rank_{rank}.pt")


def train_together_until_asked(folder: Path, *, rank: int, port: int) -> None:
    """Train as one of two processes; the second alone gets SIGTERM, in its second step."""
    appear_started_by_torchrun(rank=rank, port=port)
    model = build_model()
    steps = 0

    def ask(*_: object) -> None:
        nonlocal steps
        steps += 1
        if (rank, steps) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    model.frm.register_forward_hook(ask)
    settings = {**SETTINGS, **TOGETHER, "steps": 6, "checkpoint_every": 100, "devices": 2}
    train(model, build_synthetic_set(), scratch=folder / "asked", **settings)


def appear_started_by_torchrun(*, rank: int, port: int) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
    }


def start(function: Callable[..., None], *arguments: Any, **named: Any) -> int:
    """Run a function in a forked process, which spares it the import of torch; the process's id."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments, **named)
        except TrainingInterrupted:
            os._exit(128 + signal.SIGTERM)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def wait_for(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    ended = {
        name: wait_for(start(train_and_die, folder / name, **death))
        for name, death in DEATHS.items()
    }
    port = find_port()
    pair = [start(train_together, folder, rank=rank, port=port) for rank in range(2)]
    ended |= {f"rank {rank}": wait_for(child) for rank, child in enumerate(pair)}
    port = find_port()
    pair = [start(train_together_until_asked, folder, rank=rank, port=port) for rank in range(2)]
    ended |= {f"rank {rank} of those asked": wait_for(child) for rank, child in enumerate(pair)}
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
