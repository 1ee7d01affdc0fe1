"""`kedro mlflow`, imported when it is asked for: Kedro imports all plugins' commands at a start."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

import click

_MODULE = "kedro_mlflow.framework.cli.cli"  # of kedro-mlflow's entry point; brings MLflow


def defer_mlflow_commands() -> None:
    """Put a stand-in where Kedro looks for kedro-mlflow's commands, unless they are imported."""
    sys.modules.setdefault(_MODULE, _StandIn(_MODULE))


def _imported() -> ModuleType:
    if isinstance(sys.modules.get(_MODULE), _StandIn):
        del sys.modules[_MODULE]
    return import_module(_MODULE)


class _Commands(click.Group):
    """The plugin's one command, `mlflow`, by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["mlflow"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name != "mlflow":
            return None
        command: click.Command = _imported().mlflow_commands
        return command


class _StandIn(ModuleType):
    """A module that has the group of commands, and all else after an import."""

    commands = _Commands("Mlflow")

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        return getattr(_imported(), name)
