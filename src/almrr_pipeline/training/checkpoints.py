"""Checkpoints for resuming: written atomically, checked before use, bound to a fingerprint.

Their folder is outside of all outputs of DVC, because DVC deletes a stage's outputs before it runs
the stage.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import almrr_pipeline
from almrr_pipeline.common.files import hash_file, write_atomically

logger = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints kept: the newest, and the one before in case the newest cannot be read."""


def fingerprint(values: Mapping[str, Any], files: Iterable[Path] = ()) -> str:
    """32 hexadecimal digits, equal if and only if the values and the files' contents are.

    Args:
        values: settings and whatever else decides the result; anything that JSON can hold. Data
            are represented by their checksums, as in synthetic_set.json.
        files: files whose name and content, but not folder, decide the result.
    """
    contents = sorted((path.name, hash_file(path)) for path in files)
    text = json.dumps({"values": values, "files": contents}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def source_files() -> list[Path]:
    """The package's files that decide the weights: the model's and the training's."""
    package = Path(almrr_pipeline.__file__).parent
    folders = (package / "model", package / "training")
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


@dataclass(frozen=True)
class Resuming:
    """Which interrupted training a training goes on from.

    Attributes:
        scratch: folder for checkpoints; no output of DVC, and shared by all nodes.
        fingerprint: of data and code (see `fingerprint`); together with the model's and the
            training's settings it selects the checkpoint.
        keep: leave the last checkpoint for the caller to remove when the model is safe.
    """

    scratch: Path
    fingerprint: str
    keep: bool = False


class CheckpointFolder:
    """The checkpoints of one training.

    Args:
        scratch: folder of all unfinished trainings; this one's is below it.
        key: the training's fingerprint.
    """

    def __init__(self, scratch: Path, key: str) -> None:
        self.path = scratch / key
        self.key = key
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(self, step: int, parts: Mapping[str, Any], *, background: bool = False) -> Path:
        """Write the parts' states after `step` steps, and remove all but the newest checkpoints.

        Parts are a model, an optimizer ..., each with `state_dict` and `load_state_dict`. In the
        background a copy of the states is written, so that a GPU goes on; see `wait`.
        """
        self.wait()
        content: Any = {name: part.state_dict() for name, part in parts.items()}
        content |= {"fingerprint": self.key, "step": step}
        path = self.path / f"step_{step:09d}.ckpt"
        if background:
            self._writing = self._thread.submit(self._write, _copy_to_host(content), path)
        else:
            self._write(content, path)
        return path

    def __enter__(self) -> Self:
        """Write in the background, if at all, only until the end of the `with` statement."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the writing thread, whatever has happened."""
        self._thread.shutdown()

    def wait(self) -> None:
        """Wait for the checkpoint that is written in the background; raises what that raised."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, content: dict[str, Any], path: Path) -> None:
        buffer = io.BytesIO()  # torch's own writer hides from its error that the disk is full
        torch.save(content, buffer)
        try:
            self._place(buffer, path)
        except FileNotFoundError:  # another process has ended this training, and removed the folder
            self._place(buffer, path)
        for old in self._all()[KEPT:]:
            old.unlink(missing_ok=True)

    def _place(self, buffer: io.BytesIO, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial:
            partial.write_bytes(buffer.getbuffer())

    def restore(self, path: Path, parts: Mapping[str, Any]) -> int:
        """Load the parts' states from a checkpoint that `newest` chose; returns its step."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(content[name])
        step: int = content["step"]
        logger.info("Resuming from the checkpoint %s.", path)
        return step

    def newest(self) -> Path | None:
        """The newest checkpoint that is undamaged and of this training; None to start afresh."""
        paths = self._all()
        for path, older in zip_longest(paths, paths[1:]):
            fault = self._find_fault(path)
            if fault is None:
                return path
            then = f"trying {older.name}" if older else "the training begins again"
            logger.warning("Checkpoint %s is unusable: %s; %s.", path, fault, then)
        return None

    def remove(self) -> None:
        """Remove the training's folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.path.glob("step_*.ckpt"), reverse=True)

    def _find_fault(self, path: Path) -> str | None:
        """The fault of a checkpoint, or None. Reads all of it: torch alone checks no checksums."""
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                return f"{damaged} in it is damaged"
            key = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["fingerprint"]
        except Exception as error:  # reading damaged bytes may raise anything
            return f"it cannot be read ({error})"
        return None if key == self.key else "it belongs to other parameters, data or code"


def _copy_to_host(content: dict[str, Any]) -> dict[str, Any]:
    """The same with copies of all tensors in main memory, page-locked if they come from a GPU."""
    copied: dict[str, Any] = tree_map_only(
        Tensor, lambda one: one.to("cpu", non_blocking=True, copy=True), content
    )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().synchronize()
    return copied
