"""What every MLflow run of this project carries: all parameters, flattened, and the tags that tell runs apart."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlflow
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro_mlflow.framework.hooks import MlflowHook

from almrr_pipeline.kedro_support.config_loader import ParamsYamlLoader
from almrr_pipeline.kedro_support.redaction import shown_parameters

LONGEST_VALUE = 500
"""MLflow's limit for the text of a parameter, which it refuses to exceed."""


class TrackingHook(MlflowHook):  # type: ignore[misc]  # kedro-mlflow is not typed
    """kedro-mlflow's hook, logging the parameters as a whole instead of each node's share."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Set tracking up, and keep the parameters for the run to come."""
        super().after_context_created(context)
        self._parameters = cast(ParamsYamlLoader, context.config_loader).parameters
        self._project = Path(context.project_path)

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Start the run, then log its parameters and tags; of processes that train together, the first does."""
        if helps_another_process():
            self._is_mlflow_enabled = False
            return
        super().before_pipeline_run(run_params=run_params, pipeline=pipeline, catalog=catalog)
        if not self._is_mlflow_enabled:
            return
        categories = list(run_params.get("namespaces") or self._parameters.categories)
        own = self._parameters.for_category(categories[0]) if len(categories) == 1 else self._parameters
        mlflow.log_params(flatten(shown_parameters(own)))
        stages = run_params.get("pipeline_names") or ["all"]
        self._stage = "+".join(stages)
        mlflow.set_tags(run_tags(self._project, stage=self._stage, category="+".join(categories)))
        self._by_category = len(run_params.get("namespaces") or ()) != 1
        self._children: dict[str, str] = {}
        if len(categories) == 1:
            mlflow.set_tag("mlflow.runName", f"{'+'.join(stages)} {categories[0]}")

    @hook_impl
    def before_node_run(self, node: Node, catalog: DataCatalog, inputs: dict[str, Any], is_async: bool) -> None:
        """In a run of several categories, let what a node logs go to its category's child run."""
        super().before_node_run(node=node, catalog=catalog, inputs=inputs, is_async=is_async)
        if self._is_mlflow_enabled and self._by_category and node.namespace:
            self._start_child(node.namespace)

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        """Return to the parent run."""
        if self._is_mlflow_enabled and self._by_category and node.namespace:
            mlflow.end_run()

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:  # noqa: ANN401  whatever was saved
        """Log the metrics of a category as they are found, and those of a report with a child run per category."""
        if not self._is_mlflow_enabled:
            return
        category, _, name = dataset_name.rpartition(".")
        if name == "metrics" and self._by_category:
            self._log_child(category, data)
        elif name == "metrics":
            mlflow.log_metrics(numbers(data))
        elif name == "summary":
            mlflow.log_metrics(numbers(data["mean"]))
            for one, metrics in data["categories"].items():
                self._log_child(one, metrics)

    def _log_child(self, category: str, metrics: Mapping[str, Any]) -> None:
        self._start_child(category)
        mlflow.log_metrics(numbers(metrics))
        mlflow.end_run()

    def _start_child(self, category: str) -> None:
        """Open a category's child run, again if there is one."""
        if category in self._children:
            mlflow.start_run(run_id=self._children[category], nested=True)
            return
        self._children[category] = mlflow.start_run(run_name=category, nested=True).info.run_id
        mlflow.log_params(flatten(shown_parameters(self._parameters.for_category(category))))
        mlflow.set_tags(run_tags(self._project, stage=self._stage, category=category))

    def _log_param(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Leave out kedro-mlflow's own logging, which would write each typed section as one string."""


def helps_another_process() -> bool:
    """Whether this is one of several processes of a distributed training, and not the first."""
    return any(os.environ.get(rank, "0") != "0" for rank in ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as `section.name: text`, cut to the length that MLflow takes."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = str(value)[:LONGEST_VALUE]
    return flat


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers at the top of a metrics.json: what is undefined, and what is nested, stays out."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def run_tags(project: Path, *, stage: str, category: str) -> dict[str, str]:
    """Stage, category, git commit and the DVC experiment's name, where there is one."""
    tags = {"stage": stage, "category": category, "git_commit": git_commit(project) or "unknown"}
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc_experiment"] = experiment
    return tags


def git_commit(project: Path) -> str | None:
    """The commit that is checked out, followed by `with changes` where files differ from it; None outside of git.

    dvc.lock does not count: DVC writes it while the stages run.
    """
    hash_ = ["git", "rev-parse", "--short=12", "HEAD"]
    status = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock"]
    try:
        commit, changes = (
            subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout.strip()
            for command in (hash_, status)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changes else commit
