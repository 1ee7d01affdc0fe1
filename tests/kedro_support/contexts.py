"""The context of a project, as Kedro gives it to hooks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kedro.framework.hooks.manager import _create_hook_manager
from omegaconf import OmegaConf

from almrr_pipeline.kedro_support.config_loader import ParamsYamlLoader, tracking_uri

RUN: dict[str, Any] = dict.fromkeys(
    ["tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "load_versions"]
)
"""What `kedro run` tells hooks of its command line, if it has no option."""


def build_context(project: Path) -> Any:
    """Of a project that is a folder with conf/ and params.yaml."""
    OmegaConf.clear_resolver("tracking_uri")  # of another project: Kedro keeps the first
    loader = ParamsYamlLoader(
        str(project / "conf"),
        base_env="base",
        default_run_env="local",
        custom_resolvers={"tracking_uri": lambda: tracking_uri(project)},
    )
    return SimpleNamespace(
        config_loader=loader,
        project_path=project,
        _get_config_credentials=dict,
        _hook_manager=_create_hook_manager(),
    )
