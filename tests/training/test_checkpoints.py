from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from almrr_pipeline.training import checkpoints
from almrr_pipeline.training.checkpoints import CheckpointFolder, fingerprint, source_files


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path, "key")


class Weights:
    """A part of a training, with a state of its own."""

    def __init__(self, value: float) -> None:
        self.state: dict[str, Any] = {"weights": torch.full((1000,), value)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def save(folder: CheckpointFolder, step: int) -> Path:
    return folder.save(step, {"model": Weights(step)})


def test_a_fingerprint_follows_values_and_contents(tmp_path: Path) -> None:
    file = tmp_path / "synthetic_set.json"
    file.write_text("one")
    before = fingerprint({"seed": 0, "rate": 0.1}, [file])
    assert before == fingerprint({"rate": 0.1, "seed": 0}, [file])
    assert before != fingerprint({"seed": 1, "rate": 0.1}, [file])
    assert before != fingerprint({"seed": 0, "rate": 0.1})
    file.write_text("two")
    assert before != fingerprint({"seed": 0, "rate": 0.1}, [file])


def test_a_fingerprint_does_not_follow_the_place(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "synthetic_set.json").write_text("same")
    assert fingerprint({}, [tmp_path / "here/synthetic_set.json"]) == fingerprint(
        {}, [tmp_path / "there/synthetic_set.json"]
    )


def test_source_files_are_those_of_model_and_training() -> None:
    names = {f"{path.parent.name}/{path.name}" for path in source_files()}
    assert {"training/train.py", "model/almrr.py", "scan/__init__.py"} <= names
    assert not any(name.startswith(("reporting", "evaluation", "inference")) for name in names)


def test_there_is_nothing_to_go_on_from_at_first(folder: CheckpointFolder) -> None:
    assert folder.newest() is None


def test_the_newest_checkpoint_is_taken_and_two_are_kept(folder: CheckpointFolder) -> None:
    paths = [save(folder, step) for step in (2, 4, 10)]
    assert [path.exists() for path in paths] == [False, True, True]
    assert folder.newest() == paths[-1]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    folder: CheckpointFolder, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before, last = save(folder, 2), save(folder, 4)
    content = bytearray(last.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    damaged = {
        "truncated": content[:middle],
        "flipped": content,
        "empty": b"",
        "text": b"not a checkpoint",
    }
    last.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert folder.newest() == before
    assert last.name in caplog.text


def test_only_damaged_checkpoints_mean_a_fresh_start(folder: CheckpointFolder) -> None:
    save(folder, 2).write_bytes(b"")
    assert folder.newest() is None


def test_a_checkpoint_of_another_training_is_not_taken(
    folder: CheckpointFolder, tmp_path: Path
) -> None:
    other = CheckpointFolder(tmp_path, "key")
    other.key = "other parameters"
    save(other, 2)
    assert folder.newest() is None


class _Command:
    """What a pickle would run when it is loaded as code."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._mark,)


def test_a_checkpoint_that_holds_code_is_not_taken_and_runs_nothing(
    folder: CheckpointFolder, tmp_path: Path
) -> None:
    before, mark = save(folder, 2), tmp_path / "run"
    planted = folder.path / "step_000000004.ckpt"
    torch.save({"fingerprint": folder.key, "step": 4, "model": _Command(mark)}, planted)
    assert folder.newest() == before
    with pytest.raises(pickle.UnpicklingError):
        folder.restore(planted, {"model": Weights(0)})
    assert not mark.exists()
    torch.load(planted, weights_only=False)
    assert mark.exists()  # so it would have been


def test_a_checkpoint_restores_its_step_and_all_parts(folder: CheckpointFolder) -> None:
    path = save(folder, 4)
    restored = Weights(0)
    assert folder.restore(path, {"model": restored}) == 4
    assert restored.state["weights"].tolist() == [4.0] * 1000


def test_saving_removes_what_a_killed_process_left(folder: CheckpointFolder) -> None:
    save(folder, 2)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    killed = folder.path / f".step_000000003.partial@{host}@{ended.pid}.ckpt"
    running = folder.path / f".step_000000003.partial@{host}@{os.getppid()}.ckpt"
    killed.write_bytes(b"half")
    running.write_bytes(b"half")
    save(folder, 4)
    assert not killed.exists()
    assert running.exists()


def test_a_failed_write_leaves_what_was_there(folder: CheckpointFolder) -> None:
    path = save(folder, 2)
    content = path.read_bytes()
    unsavable = Weights(2)
    unsavable.state["function"] = lambda: None
    with pytest.raises((AttributeError, TypeError)):  # pickle's, for a function without a name
        folder.save(2, {"model": unsavable})
    assert path.read_bytes() == content
    assert folder.newest() == path


def test_removing_leaves_other_trainings_alone(folder: CheckpointFolder, tmp_path: Path) -> None:
    save(folder, 2)
    other = save(CheckpointFolder(tmp_path, "other"), 2)
    folder.remove()
    assert not folder.path.exists()
    assert other.exists()


def test_a_checkpoint_is_written_also_when_another_process_ends_the_same_training_meanwhile(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.write_atomically

    def end_the_other(path: Path) -> Any:
        monkeypatch.undo()
        folder.remove()
        return write(path)

    monkeypatch.setattr(checkpoints, "write_atomically", end_the_other)
    assert save(folder, 1).is_file()
