"""Checkpoints for resuming: written beside and renamed, checked before use, bound to a fingerprint.

They lie in a scratch folder outside of everything that DVC owns, because DVC deletes a stage's outputs before it runs
the stage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import threading
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

import almrr_pipeline

logger = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints kept: the last, and the one before in case the last cannot be read."""


def fingerprint(values: Mapping[str, Any], files: Iterable[Path] = ()) -> str:
    """One short name for parameters, data and code: equal if and only if the values and the files' contents are.

    Data stand in `values` by their checksums: a synthetic set by its synthetic_set.json, which holds those of its arrays.

    Args:
        values: parameters and whatever else decides the result; anything that JSON can hold.
        files: files whose content decides the result. Their folder does not matter, their name and content do.

    Returns:
        32 hexadecimal digits.
    """
    contents = sorted((path.name, _digest(path)) for path in files)
    text = json.dumps({"values": values, "files": contents}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def source_files() -> list[Path]:
    """The package's files that decide the weights: the model's and the training's."""
    package = Path(almrr_pipeline.__file__).parent
    return sorted(path for folder in ("model", "training") for path in (package / folder).rglob("*.py"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a file of that name is always complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write `checkpoint` to `path`: all or nothing, also if the machine loses power."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".partial")
        with beside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    def load_checkpoint(self, path: str | Path, *_: object, **__: object) -> dict[str, Any]:
        """Read a checkpoint to the CPU; nothing in it can run code."""
        return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


class CheckpointFolder:
    """The checkpoints of one training.

    Args:
        scratch: a folder for trainings under way; this one gets its own below it.
        key: the training's fingerprint.
    """

    def __init__(self, scratch: Path, key: str) -> None:
        self.path = scratch / key
        self.key = key

    def place(self, step: int) -> Path:
        """Where the checkpoint after `step` steps lies."""
        return self.path / f"step_{step:09d}.ckpt"

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole and of this training; None to start afresh."""
        for path in self._all():
            fault = self._find_fault(path)
            if fault is None:
                return path
            logger.warning("The checkpoint %s is of no use: %s; trying the one before it.", path, fault)
        return None

    def prune(self) -> None:
        """Remove all but the newest checkpoints."""
        for path in self._all()[KEPT:]:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the training's folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.path.glob("step_*.ckpt"), reverse=True)

    def _find_fault(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; None if nothing is. Reads all of it: torch alone checks no checksums."""
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                return f"{damaged} in it is damaged"
            key = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("fingerprint")
        except Exception as error:  # reading damaged bytes may raise anything
            return f"it cannot be read ({error})"
        return None if key == self.key else "it belongs to other parameters, data or code"


class PeriodicCheckpoint(Callback):
    """Writes a checkpoint every so many steps, and one more when the process is asked to end (SIGTERM).

    It must stand last among the callbacks, so that it saves what the others have learnt from the step. Where processes
    share a training, all of them end after the same step if any was asked to.

    Args:
        folder: where to.
        every: steps between checkpoints.
        after_last: also after the last step.
    """

    def __init__(self, folder: CheckpointFolder, *, every: int, after_last: bool) -> None:
        self._folder = folder
        self._every = every
        self._after_last = after_last
        self._asked_to_end = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where processes share the training, take Lightning's place as the one that SIGTERM is told to.

        Lightning's handler talks to the other processes wherever the signal finds this one, and ends this one between
        two steps without asking them; either way some wait for ever. Its teardown puts back what was there before.
        """
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note_request)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save after the step if its turn has come."""
        step = trainer.global_step
        due = self._after_last if step == trainer.max_steps else step % self._every == 0
        asked_to_end = trainer.strategy.reduce_boolean_decision(
            self._asked_to_end or trainer.received_sigterm, all=False
        )
        if due or asked_to_end:
            trainer.save_checkpoint(self._folder.place(step))
            if trainer.is_global_zero:
                self._folder.prune()
        if asked_to_end:
            logger.warning("Asked to end at step %d; the next run goes on from there.", step)
            raise SIGTERMException

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bind the checkpoint to the training's fingerprint."""
        checkpoint["fingerprint"] = self._folder.key

    def _note_request(self, *_: object) -> None:
        self._asked_to_end = True
