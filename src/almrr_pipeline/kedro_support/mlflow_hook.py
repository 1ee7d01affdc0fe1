"""Kedro hook: MLflow runs with all parameters and tags. Imported only where a run is tracked."""

from __future__ import annotations

import atexit
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlflow
from kedro.config import MissingConfigException
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro_mlflow.config.kedro_mlflow_config import KedroMlflowConfig
from kedro_mlflow.framework.hooks import MlflowHook
from kedro_mlflow.framework.hooks.utils import _assert_mlflow_enabled, _generate_kedro_command
from mlflow.tracking.context.registry import resolve_tags

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.redaction import redact_address
from almrr_pipeline.kedro_support.config_loader import ParamsYamlLoader
from almrr_pipeline.kedro_support.delivery import Connection, Delivery
from almrr_pipeline.kedro_support.outbox import Outbox, metrics_event, now
from almrr_pipeline.kedro_support.tracking import flatten, live_run, numbers, run_tags

OUTBOXES = Path(".almrr", "tracking")
"""Below the project."""
_COMMAND = ("tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "load_versions")
_INTERRUPTED = "TrainingInterrupted"


@dataclass(frozen=True)
class SharedRun:
    """What another process has to know to log to this one's run."""

    run_id: str
    stage: str
    has_children: bool
    children: dict[str, str]  # run ids by namespace


class TrackingHook(MlflowHook):  # type: ignore[misc]  # kedro-mlflow is not typed
    """kedro-mlflow's settings; what a run logs goes to an outbox, which is delivered meanwhile.

    kedro-mlflow itself asks the tracker at a start, and ends the run if it does not answer. One
    category and seed make one run; several make a parent run, and a child for each.
    """

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Keep the parameters and the tracker's settings; nothing is asked of it."""
        loader = cast(ParamsYamlLoader, context.config_loader)
        self.mlflow_config = KedroMlflowConfig.model_validate(_load(loader, "mlflow"))
        if self.mlflow_config.tracking.experiment.name is None:
            self.mlflow_config.tracking.experiment.name = "almrr"
        context.__setattr__("mlflow", self.mlflow_config)
        self._required = bool(_load(loader, "tracking").get("required"))
        self._parameters = loader.parameters
        self._project = Path(context.project_path)
        self._children: dict[str, str] = {}
        self._running: set[str] = set()  # children whose node has not ended
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the delivery tries again
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._outbox = Outbox.of_this_process(self._project / OUTBOXES)
        address = self.mlflow_config.server.mlflow_tracking_uri or ""
        self.delivery = Delivery(self._outbox, address, lambda: self._connect(context))

    @hook_impl
    def before_pipeline_run(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog
    ) -> None:
        """Start the run, and log its parameters and tags.

        Raises:
            AlmrrError: the tracker takes nothing, and conf/base/tracking.yml requires it.
        """
        names = run_params.get("pipeline_names") or ["__default__"]
        self._is_mlflow_enabled = _assert_mlflow_enabled(names, self.mlflow_config)
        if not self._is_mlflow_enabled:
            return
        self._check_required()
        self.delivery.start()
        runs = sorted({str(node.namespace) for node in pipeline.nodes if _is_run(node)})
        named: list[str] = list(run_params.get("namespaces") or ())
        self._has_children = len(named) != 1 or len(runs) > 1
        self._stage = "+".join(run_params.get("pipeline_names") or ["all"])
        categories = list(dict.fromkeys(name.partition(".")[0] for name in named))
        name = f"{self._stage} {named[0]}" if len(named) == 1 else "+".join(names)
        self.run_id = self._begin(self.mlflow_config.tracking.run.name or name)
        command = {key: run_params[key] for key in _COMMAND}
        given = {key: str(value) for key, value in run_params.items() if value}
        given["kedro_command"] = _generate_kedro_command(**command, pipeline_names=names)
        self._put({"run": self.run_id, "tags": given})
        self._describe_run(self.run_id, categories or self._parameters.categories, runs)
        atexit.register(self._end_at_exit, os.getpid())

    @hook_impl
    def before_node_run(
        self, node: Node, catalog: DataCatalog, inputs: dict[str, Any], is_async: bool
    ) -> None:
        """In a run with children, let what a node logs go to the child of its category and seed."""
        if self._is_mlflow_enabled:
            run = self.run_id
            if self._has_children and _is_run(node):
                run = self._start_child(str(node.namespace))
                self._running.add(run)
            live_run.set(lambda step, values: self._put(metrics_event(run, values, step)))

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        """Return to the parent run."""
        live_run.set(None)
        if self._is_mlflow_enabled and self._has_children and _is_run(node):
            self._running.discard(self._children[str(node.namespace)])

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:  # noqa: ANN401
        """Log metrics as they are found; those of a report also with a child for each run."""
        if not self._is_mlflow_enabled:
            return
        namespace, _, name = dataset_name.rpartition(".")
        if name == "metrics" and self._has_children:
            self._log_child(namespace, data)
        elif name == "metrics" or (name == "baselines" and not self._has_children):
            self._put(metrics_event(self.run_id, numbers(data)))
        elif name == "summary":
            self._put(metrics_event(self.run_id, numbers(data["mean"])))
            for category, seeds in data["runs"].items():
                for seed, metrics in seeds.items():
                    self._log_child(f"{category}.seed_{seed}", metrics)

    @hook_impl
    def after_pipeline_run(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog
    ) -> None:
        """End the run, and wait while the tracker takes what it has logged."""
        self._finish("FINISHED")

    @hook_impl
    def on_pipeline_error(
        self,
        error: Exception,
        run_params: dict[str, Any],
        pipeline: Pipeline,
        catalog: DataCatalog,
    ) -> None:
        """End the run and its open children: as killed, if the process was asked to end."""
        self._finish("KILLED" if type(error).__name__ == _INTERRUPTED else "FAILED")

    @property
    def children(self) -> dict[str, str]:
        """Child runs' ids by namespace."""
        return dict(self._children)

    def add_children(self, children: Mapping[str, str]) -> None:
        """Take over child runs that another process has begun."""
        if self._is_mlflow_enabled:
            self._children.update(children)

    def share(self) -> SharedRun | None:
        """Describe the run, so that another process can `join` it; None if it is not tracked."""
        if not self._is_mlflow_enabled:
            return None
        return SharedRun(self.run_id, self._stage, self._has_children, self.children)

    @contextmanager
    def join(self, run: SharedRun) -> Iterator[None]:
        """Log to a run of another process, which alone ends it."""
        self.run_id, self._stage = run.run_id, run.stage
        self._has_children, self._children = run.has_children, dict(run.children)
        self._is_mlflow_enabled = True
        self.delivery.start()
        try:
            yield
        except BaseException:
            self._finish("FAILED")
            raise
        self._finish("FINISHED")

    def _check_required(self) -> None:
        if self._required and (fault := self.delivery.require()):
            raise AlmrrError(
                f"MLflow at {redact_address(self.delivery.address)} takes nothing now ({fault}); "
                "start it, or let runs go on without it: required: false in conf/base/tracking.yml."
            )

    def _connect(self, context: KedroContext) -> Connection:
        """Let kedro-mlflow set the tracker up: credentials, address, experiment."""
        self.mlflow_config.setup(context)
        server, experiment = self.mlflow_config.server, self.mlflow_config.tracking.experiment
        return Connection(server._mlflow_client, experiment._experiment.experiment_id)

    def _put(self, event: dict[str, Any]) -> None:
        self._outbox.put(event)

    def _begin(self, name: str, *, parent: str | None = None) -> str:
        """Start a run, or go on with the one that kedro-mlflow's settings or MLflow name."""
        run, active = secrets.token_hex(16), mlflow.active_run()
        existing = active.info.run_id if active else self.mlflow_config.tracking.run.id
        event = {"run": run, "start": now(), "name": name, "tags": resolve_tags()}
        if parent:
            event["parent"] = parent
        elif existing:
            event["existing"] = existing
        self._put(event)
        return run

    def _finish(self, status: str) -> None:
        if self._is_mlflow_enabled:
            for run in self._outbox.unfinished():
                done = run in self._children.values() and run not in self._running
                self._put({"run": run, "end": "FINISHED" if done else status, "time": now()})
            self.delivery.finish()
            atexit.unregister(self._end_at_exit)

    def _end_at_exit(self, process: int) -> None:
        """End what neither ended nor failed: the process was interrupted."""
        if os.getpid() == process:
            self._finish("KILLED")

    def _log_child(self, namespace: str, metrics: Mapping[str, Any]) -> None:
        run = self._start_child(namespace)
        self._put(metrics_event(run, numbers(metrics)))

    def _start_child(self, namespace: str) -> str:
        """The child run of a category and seed, begun if there is none."""
        if namespace not in self._children:
            self._children[namespace] = self._begin(namespace, parent=self.run_id)
            category = namespace.partition(".")[0]
            self._describe_run(self._children[namespace], [category], [namespace])
        return self._children[namespace]

    def _describe_run(self, run: str, categories: list[str], runs: list[str]) -> None:
        """Log the parameters (of one category its own) and the tags of a run."""
        every = self._parameters
        own = every.for_category(categories[0]) if len(categories) == 1 else every
        self._put({"run": run, "params": flatten(own.redacted())})
        seeds = dict.fromkeys(name.rpartition(".seed_")[2] for name in runs)
        names = {"category": "+".join(categories), "seed": "+".join(seeds)}
        self._put({"run": run, "tags": run_tags(self._project, stage=self._stage, **names)})


def _load(loader: ParamsYamlLoader, kind: str) -> dict[str, Any]:
    """Settings of conf/base/KIND*.yml; none, if there is no such file."""
    loader.config_patterns.setdefault(kind, [f"{kind}*", f"{kind}*/**", f"**/{kind}*"])
    try:
        return dict(loader[kind] or {})
    except MissingConfigException:
        return {}


def _is_run(node: Node) -> bool:
    """Whether a node is one of a category and seed: its namespace is CATEGORY.seed_N."""
    return "." in (node.namespace or "")
