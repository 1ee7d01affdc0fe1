"""Kedro's settings for this project."""

from __future__ import annotations

from almrr_pipeline.kedro_support.config_loader import (
    ParamsYamlLoader,
    project_root,
    tracking_uri,
)
from almrr_pipeline.kedro_support.hooks import ProjectHook
from almrr_pipeline.kedro_support.mlflow_commands import defer_mlflow_commands

CONFIG_LOADER_CLASS = ParamsYamlLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    "custom_resolvers": {"tracking_uri": lambda: tracking_uri(project_root())},
}

# ProjectHook replaces kedro-mlflow's own hook; both spellings of the plugin's name occur.
DISABLE_HOOKS_FOR_PLUGINS = ("kedro-mlflow", "kedro_mlflow")
HOOKS = (ProjectHook(),)

defer_mlflow_commands()  # MLflow costs each start seconds of processor time
