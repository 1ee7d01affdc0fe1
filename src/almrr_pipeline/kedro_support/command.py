"""`kedro run` that ends in one sentence for a user's error, and in 143 after SIGTERM."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import click
from kedro.framework.cli.project import run as kedro_run

from almrr_pipeline.common.errors import AlmrrError

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a process that SIGTERM has ended, as shells and SLURM know it."""


def user_error(error: BaseException) -> AlmrrError | None:
    """The first AlmrrError in a chain of causes; Kedro wraps errors of loading and saving."""
    return next((link for link in _chain(error) if isinstance(link, AlmrrError)), None)


def is_interruption(error: BaseException) -> bool:
    """Whether SIGTERM has ended a training, which a further run resumes."""
    from almrr_pipeline.training.train import TrainingInterrupted  # slow: brings torch

    return any(isinstance(link, TrainingInterrupted) for link in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _with_plain_endings(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def run_plainly(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        try:
            return command(*args, **kwargs)
        except Exception as error:
            if found := user_error(error):
                raise click.ClickException(str(found)) from None
            if is_interruption(error):
                sys.exit(TERMINATED)
            raise

    return run_plainly


@click.group(name="almrr_pipeline")
def cli() -> None:
    """Commands of this project."""


run = click.Command(
    name="run",
    callback=_with_plain_endings(cast(Callable[..., Any], kedro_run.callback)),
    params=kedro_run.params,
    help=kedro_run.help,
    short_help=kedro_run.short_help,
)
cli.add_command(run)
