"""A stage's commands in a process that stays: Kedro, torch and MLflow are imported once, not anew.

Nothing slow is imported here: the process gets its number of threads first.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError

LOGS = Path(".almrr", "logs")
"""Below the project: a file for each unit of work, with all that it printed."""


def limit_threads(threads: int) -> None:
    """Let torch use so many threads in this process, which has not imported it yet."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@contextmanager
def importing_mlflow() -> Iterator[None]:
    """Import MLflow and kedro-mlflow in the block: without their advice, progress bars and news."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with warnings.catch_warnings(record=True):
        yield


def import_libraries() -> None:
    """Import what takes seconds, before a stage needs it."""
    with importing_mlflow():
        import almrr_pipeline.kedro_support.command
        import almrr_pipeline.kedro_support.mlflow_hook
        import almrr_pipeline.training.train  # noqa: F401


def run_commands(
    unit: str, commands: Sequence[str], project: Path, environment: Mapping[str, str]
) -> None:
    """Run a stage's commands in the project's folder: `kedro run` in this process, others outside.

    Raises:
        AlmrrError: one of them failed.
    """
    with working_for(unit, project, environment):
        for command in commands:
            words = shlex.split(command)
            if words[:2] == ["kedro", "run"]:
                _run_kedro(words[2:], project)
            elif code := subprocess.run(command, shell=True, check=False).returncode:
                raise AlmrrError(f"{command} ended with {code}")


@contextmanager
def working_for(unit: str, project: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Work in the project's folder, and print into the unit's log there.

    Raises:
        AlmrrError: what was done raised anything; one sentence, the rest is in the log.
    """
    os.environ.update(environment)
    os.chdir(project)
    log = project / LOGS / f"{unit}.log"
    with _printing_to(log):
        try:
            yield
        except AlmrrError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise AlmrrError(str(error)) from None  # without causes that cannot be pickled
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            where = log.relative_to(project)
            raise AlmrrError(f"{reason} (the traceback is in {where})") from None


def _run_kedro(arguments: list[str], project: Path) -> None:
    import click
    from kedro.framework.startup import bootstrap_project

    from almrr_pipeline.kedro_support.command import run

    bootstrap_project(project)  # forgets the pipelines of an earlier stage
    try:
        run.main(arguments, prog_name="kedro run", standalone_mode=False)
    except click.ClickException as error:
        raise AlmrrError(error.format_message()) from None
    except SystemExit as ending:
        if ending.code:
            raise AlmrrError(f"it ended with {ending.code}") from None


@contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Let this process and those that it starts print into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(stream) for stream in (1, 2)]
    with log.open("ab") as file:
        _redirect(file.fileno(), file.fileno())
    try:
        yield
    finally:
        _redirect(*kept)
        for stream in kept:
            os.close(stream)


def _redirect(out: int, err: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)
