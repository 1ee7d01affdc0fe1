"""Kedro hook: MLflow runs with all parameters and tags. Imported only where a run is tracked."""

from __future__ import annotations

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
from almrr_pipeline.kedro_support.tracking import flatten, numbers, run_tags


class TrackingHook(MlflowHook):  # type: ignore[misc]  # kedro-mlflow is not typed
    """kedro-mlflow's hook, logging the parameters as a whole instead of what each node takes.

    One category and seed make one run; several make a parent run, and a child for each.
    """

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Set tracking up, which creates or migrates a database; keep the parameters."""
        super().after_context_created(context)
        self._parameters = cast(ParamsYamlLoader, context.config_loader).parameters
        self._project = Path(context.project_path)

    @hook_impl
    def before_pipeline_run(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog
    ) -> None:
        """Start the run, and log its parameters and tags."""
        super().before_pipeline_run(run_params=run_params, pipeline=pipeline, catalog=catalog)
        if not self._is_mlflow_enabled:
            return
        runs = sorted({str(node.namespace) for node in pipeline.nodes if _is_run(node)})
        named: list[str] = list(run_params.get("namespaces") or ())
        self._has_children = len(named) != 1 or len(runs) > 1
        self._children: dict[str, str] = {}
        self._stage = "+".join(run_params.get("pipeline_names") or ["all"])
        categories = list(dict.fromkeys(name.partition(".")[0] for name in named))
        self._describe_run(categories or self._parameters.categories, runs)
        if len(named) == 1:
            mlflow.set_tag("mlflow.runName", f"{self._stage} {named[0]}")

    @hook_impl
    def before_node_run(
        self, node: Node, catalog: DataCatalog, inputs: dict[str, Any], is_async: bool
    ) -> None:
        """In a run with children, let what a node logs go to the child of its category and seed."""
        super().before_node_run(node=node, catalog=catalog, inputs=inputs, is_async=is_async)
        if self._is_mlflow_enabled and self._has_children and _is_run(node):
            self._start_child(str(node.namespace))

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        """Return to the parent run."""
        if self._is_mlflow_enabled and self._has_children and _is_run(node):
            mlflow.end_run()

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:  # noqa: ANN401
        """Log metrics as they are found; those of a report also with a child for each run."""
        if not self._is_mlflow_enabled:
            return
        namespace, _, name = dataset_name.rpartition(".")
        if name == "metrics" and self._has_children:
            self._log_child(namespace, data)
        elif name == "metrics" or (name == "baselines" and not self._has_children):
            mlflow.log_metrics(numbers(data))
        elif name == "summary":
            mlflow.log_metrics(numbers(data["mean"]))
            for category, seeds in data["runs"].items():
                for seed, metrics in seeds.items():
                    self._log_child(f"{category}.seed_{seed}", metrics)

    def _log_child(self, namespace: str, metrics: Mapping[str, Any]) -> None:
        self._start_child(namespace)
        mlflow.log_metrics(numbers(metrics))
        mlflow.end_run()

    def _start_child(self, namespace: str) -> None:
        """Open the child run of a category and seed, again if there is one."""
        known = self._children.get(namespace)
        run = mlflow.start_run(run_id=known, run_name=namespace, nested=True)
        if known is None:
            self._children[namespace] = run.info.run_id
            self._describe_run([namespace.partition(".")[0]], [namespace])

    def _describe_run(self, categories: list[str], runs: list[str]) -> None:
        """Log the parameters (of one category its own) and the tags of the active run."""
        every = self._parameters
        own = every.for_category(categories[0]) if len(categories) == 1 else every
        mlflow.log_params(flatten(own.redacted()))
        seeds = dict.fromkeys(run.rpartition(".seed_")[2] for run in runs)
        names = {"category": "+".join(categories), "seed": "+".join(seeds)}
        mlflow.set_tags(run_tags(self._project, stage=self._stage, **names))

    def _log_param(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Skip kedro-mlflow's own logging, which would write a typed section as one string."""


def _is_run(node: Node) -> bool:
    """Whether a node is one of a category and seed: its namespace is CATEGORY.seed_N."""
    return "." in (node.namespace or "")
