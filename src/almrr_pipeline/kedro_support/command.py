"""`kedro run` that ends in one sentence for a user's error, and in 143 after SIGTERM."""

from __future__ import annotations

import copy
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from kedro.framework.cli.project import run as kedro_run
from kedro.io import DatasetError

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import explain_disk_error

Kind = TypeVar("Kind", bound=BaseException)
TERMINATED = 128 + signal.SIGTERM  # as shells and SLURM know a process that SIGTERM has ended


def _find(kind: type[Kind], error: BaseException | None) -> Iterator[Kind]:
    """The errors of a type in a chain of causes: Kedro wraps errors of loading and saving."""
    while error is not None:
        if isinstance(error, kind):
            yield error
        error = error.__cause__ or error.__context__


def _explain_disk(error: Exception) -> str | None:
    """What a dataset of Kedro's met that could not write; None where that was not the trouble."""
    if not isinstance(error, DatasetError) or "saving" not in str(error):
        return None
    for found in _find(OSError, error):
        if explained := explain_disk_error(found, Path(found.filename or "a file")):
            return f"{str(error).partition(':')[0]}: {explained}"  # Kedro names the dataset first
    return None


def _with_plain_endings(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def run_plainly(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        try:
            return command(*args, **kwargs)
        except Exception as error:
            for found in _find(AlmrrError, error):
                raise click.ClickException(str(found)) from None
            if sentence := _explain_disk(error):
                raise click.ClickException(sentence) from None
            from almrr_pipeline.training.train import TrainingInterrupted  # slow: brings torch

            for interrupted in _find(TrainingInterrupted, error):
                click.echo(f"{interrupted} A further run goes on from there.", err=True)
                sys.exit(TERMINATED)
            raise

    return run_plainly


run = copy.copy(kedro_run)
run.callback = _with_plain_endings(kedro_run.callback)  # type: ignore[arg-type]
cli = click.Group("almrr_pipeline", {"run": run}, help="Commands of this project.")
