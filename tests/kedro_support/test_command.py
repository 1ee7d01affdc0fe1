from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

import click
import pytest
from kedro.io import DatasetError

from almrr_pipeline import cli
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.kedro_support import command
from almrr_pipeline.training.train import TrainingInterrupted


def _raise(error: Exception, cause: Exception | None = None) -> Callable[[], None]:
    def run() -> None:
        raise error from cause

    return run


def test_kedro_finds_the_project_s_commands_where_it_looks_for_them() -> None:
    assert cli.cli is command.cli
    assert cli.run is command.run
    assert "run" in cli.cli.commands


def test_the_run_command_takes_all_options_of_kedro_s_own() -> None:
    from kedro.framework.cli.project import run

    assert command.run.params == run.params


def test_an_error_for_the_user_ends_in_its_sentence_also_where_kedro_wraps_it() -> None:
    wrapped = _raise(DatasetError("Failed while saving"), AlmrrError("The disk is full."))
    with pytest.raises(click.ClickException) as ended:
        command._with_plain_endings(wrapped)()
    assert ended.value.message == "The disk is full."
    assert ended.value.exit_code == 1


def test_a_disk_that_refuses_what_kedro_saves_is_named_in_a_sentence() -> None:
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS), "data/07/0.npy")
    failing = _raise(DatasetError("a.maps: Failed while saving data to dataset."), refused)
    with pytest.raises(click.ClickException) as ended:
        command._with_plain_endings(failing)()
    assert ended.value.message.startswith("a.maps: data/07/0.npy cannot be written (Read-only")
    loading = _raise(DatasetError("a.maps: Failed while loading data from dataset."), refused)
    with pytest.raises(DatasetError):
        command._with_plain_endings(loading)()


def test_an_interrupted_training_says_so_and_ends_with_the_status_of_sigterm(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        command._with_plain_endings(_raise(TrainingInterrupted("Stopped after step 5.")))()
    assert ended.value.code == 128 + signal.SIGTERM == 143
    assert capsys.readouterr().err == "Stopped after step 5. A further run goes on from there.\n"


def test_any_other_error_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        command._with_plain_endings(_raise(KeyError("a bug")))()
