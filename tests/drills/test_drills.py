"""The short form of `make drill`: faults that need no run of the project."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from almrr_pipeline.common.errors import DiskError
from almrr_pipeline.common.files import staging_folder, write_atomically
from almrr_pipeline.config import BackboneSettings, ModelSettings
from almrr_pipeline.kedro_support.outbox import Outbox, metrics_event
from almrr_pipeline.model.weights_io import ModelConfig, write_model
from almrr_pipeline.training.checkpoints import CheckpointFolder

_spec = importlib.util.spec_from_file_location("drill", Path(__file__).with_name("drill.py"))
assert _spec is not None
assert _spec.loader is not None
drill = importlib.util.module_from_spec(_spec)
sys.modules["drill"] = drill  # dataclasses look their module up
_spec.loader.exec_module(drill)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A disk of 16 KiB with a file on it."""
    folder = tmp_path / "disk"
    try:
        disk = drill.small_disk(folder, kilobytes=16)
        disk.__enter__()
    except PermissionError as error:
        pytest.skip(str(error))
    (folder / "file").write_text("old")
    yield folder
    disk.__exit__(None, None, None)


def test_a_full_disk_leaves_the_file_that_was_there(full: Path) -> None:
    with (
        pytest.raises(DiskError, match="The disk is full"),
        write_atomically(full / "file") as partial,
    ):
        partial.write_bytes(bytes(1 << 20))
    assert [path.name for path in full.iterdir()] == ["file"]
    assert (full / "file").read_text() == "old"


def test_a_full_disk_is_named_where_a_checkpoint_or_a_model_is_written(full: Path) -> None:
    tensors = torch.nn.Linear(100, 100)
    with pytest.raises(DiskError, match="The disk is full"):
        CheckpointFolder(full, "key").save(1, {"model": tensors})
    sizes = {"backbone": BackboneSettings(), "image_size": (128, 128), "model": ModelSettings()}
    with pytest.raises(DiskError, match="The disk is full"):
        write_model(full, ModelConfig(**sizes), tensors.state_dict())
    assert sorted(path.name for path in full.iterdir()) == ["file", "key"]


def test_a_full_disk_does_not_stop_what_logs(full: Path) -> None:
    (full / "more").write_bytes(bytes(12_000))
    box = Outbox(full / "box.jsonl")
    for step in range(300):
        box.put(metrics_event("run", {"loss": 0.5}, step))
    assert len(box) == 300


def test_what_a_killed_writer_has_left_is_swept_at_the_next_start(tmp_path: Path) -> None:
    def fill_and_die() -> None:
        with staging_folder(tmp_path) as folder:
            (folder / "half").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=fill_and_die)
    process.start()
    process.join()
    assert len([*tmp_path.iterdir()]) == 1
    with staging_folder(tmp_path) as folder:
        assert [*tmp_path.iterdir()] == [folder]


def test_a_warm_command_ends_as_others_do(tmp_path: Path) -> None:
    warm, address = Path(__file__).with_name("warm.py"), tmp_path / "socket"
    serving = subprocess.Popen([sys.executable, warm, "serve", address])
    try:
        while not address.is_socket():
            time.sleep(0.01)
        command = [sys.executable, "-I", "-S", warm, "run", address, "dvc", "nonsense"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, check=False, **pipes)
        assert done.returncode == 254
        assert "invalid choice: 'nonsense'" in done.stdout
        ended = subprocess.Popen(command, process_group=0, **pipes)
        os.killpg(ended.pid, signal.SIGKILL)
        assert ended.communicate() == ("", None)  # nobody is left who could write
    finally:
        serving.kill()
        serving.wait()


def test_tries_of_several_rounds_add_up() -> None:
    table = drill.merge("", [drill.Row("SIGKILL in train", 5, 0, 1, "Old.")])
    table = drill.merge(table, [drill.Row("SIGKILL in train", 3, 0, 0, "")], add=True)
    assert table.splitlines()[2:] == ["| SIGKILL in train | 8 | 0 | 1 | Old. |"]


@pytest.mark.parametrize(
    ("during", "after", "read"),
    [
        (
            "INFO  x\nError: /a/b/c is damaged; copy\nit again.\n",
            "",
            "c is damaged; copy it again.",
        ),
        (
            "Running stage 'train':\nSIGTERM: stopped after step 3. All is well.\nAborted!",
            "Resuming from the checkpoint a/step_3.ckpt.",
            "SIGTERM: stopped after step 3. All is well.",
        ),
        (
            "Running stage 'a':\n\nAborted!\nERROR: failed to reproduce 'a': failed to run: x",
            "05:00:00 INFO    Resuming from the checkpoint .almrr/a/step_000000003.ckpt.",
            "Aborted! Then `dvc repro`: Resuming from the checkpoint step_000000003.ckpt.",
        ),
        (
            "ModuleNotFoundError: No module named 'a'\nKeyboardInterrupt\n"
            "ERROR: interrupted by the user\n",
            "Running stage 'a':",
            "ERROR: interrupted by the user. Then `dvc repro`: Running stage 'a':",
        ),
        (
            "",
            "Stage 'a@b-0' is cached - skipping run, checking out outputs",
            "Nothing. Then `dvc repro`: "
            "Stage 'a@b-0' is cached - skipping run, checking out outputs",
        ),
        (
            "ERROR: failed to reproduce 'a': [Errno 30] Read-only file system: "
            "'/p q/.dvc/cache/runs/b7'\nUse `dvc push` to send your updates.",
            "",
            "failed to reproduce 'a': [Errno 30] Read-only file system: '.dvc/cache/...'",
        ),
    ],
)
def test_the_drills_read_the_sentence_that_a_user_reads(during: str, after: str, read: str) -> None:
    assert drill.read_by_user(during, after, Path("/p q"), ends=False)[1] == read


def test_the_row_of_a_fault_that_costs_nothing_has_the_run_s_last_line() -> None:
    printed = "Running stage 'train':\n05:51:44 INFO    2 nodes in 1.7 s. In MLflow: x\n"
    assert drill.read_by_user(printed, "", Path("/p"), ends=True)[1] == "2 nodes in N s."
    assert str(drill.Row("fault", 1, 0, 0, "A sentence.")) == "| fault | 1 | 0 | 0 | A sentence. |"


def test_the_kills_of_a_stage_are_those_of_three_signals() -> None:
    signals = ("SIGKILL", "SIGTERM", "Ctrl-C")
    counts = [drill.share(f"{each} in train", tries=3, kills=50) for each in signals]
    assert counts == [20, 15, 15]
    assert drill.share("disk full in train", tries=3, kills=50) == 3
    assert drill.share("no git", tries=3, kills=50) == 1
