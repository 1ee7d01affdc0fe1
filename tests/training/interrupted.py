"""Trains the tiny model in processes that die on the way, one for each of DEATHS. Not a test: run by test_resume.

Prints how each of them ended (as subprocess counts: minus the signal's number, or the exit status), as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from tiny_training import DEATHS, SETTINGS, build_model, build_pool

from almrr_pipeline.training import checkpoints
from almrr_pipeline.training.fit import fit


def train_and_die(scratch: Path, *, row: int = 0, checkpoint: int = 0, by: str = "SIGKILL") -> None:
    """Train until a row of the history is made, or until the middle of writing a checkpoint; then die by a signal."""

    def die_at_the_row(step: int, values: Mapping[str, float]) -> None:
        if step == row:
            os.kill(os.getpid(), signal.Signals[by])

    if checkpoint:
        die_in_the_middle_of_writing(checkpoint)
    fit(build_model(standardize=True), build_pool(), scratch=scratch, on_metrics=die_at_the_row, **SETTINGS)


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

    checkpoints.os.fsync = kill_instead


def main() -> None:
    torch.set_num_threads(1)
    ended = {}
    for name, death in DEATHS.items():
        child = os.fork()  # one import of torch for all
        if child == 0:
            train_and_die(Path(sys.argv[1]) / name, **death)
            os._exit(0)
        ended[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
