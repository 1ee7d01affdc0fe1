"""Kedro hook: MLflow runs with all parameters and tags. Imported only where a run is tracked."""

from __future__ import annotations

import atexit
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
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
from almrr_pipeline.kedro_support.config_loader import ParamsYamlLoader, own_database
from almrr_pipeline.kedro_support.delivery import Connection, Delivery
from almrr_pipeline.kedro_support.mlflow_files import ARTIFACTS, bring_home
from almrr_pipeline.kedro_support.outbox import Outbox, metrics_event, now
from almrr_pipeline.kedro_support.tracking import (
    Experiment,
    describe_dataset,
    flatten,
    live_run,
    numbers,
    run_tags,
)

OUTBOXES = Path(".almrr", "tracking")
"""Below the project."""
_COMMAND = ("tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "load_versions")
KIND, MACHINE_LEARNING = "mlflow.experimentKind", "custom_model_development"
"""Tag by which MLflow's pages tell runs and metrics from traces and prompts."""
_INTERRUPTED = "TrainingInterrupted"
_ARTIFACTS = {"report_page": "", "overlays@partitions": "panels", "curves": "curves"}
"""Datasets whose files a run gets, and the folder for them among its artifacts."""


@dataclass(frozen=True)
class SharedRun:
    """What another process has to know to log to this one's run."""

    run_id: str
    stage: str
    has_children: bool
    children: dict[str, str]  # run ids by namespace


class TrackingHook(MlflowHook):  # type: ignore[misc]  # kedro-mlflow is not typed
    """kedro-mlflow's settings; what a run logs goes to an outbox, which is delivered meanwhile.

    kedro-mlflow itself asks the tracker at a start, and ends the run if it does not answer. A stage
    of one category (and seed) makes one run, below that of the category and seed, below that of the
    experiment, which the report's own is. Several make a parent run, and a child for each.
    """

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Keep the parameters and the tracker's settings; nothing is asked of it."""
        loader = cast(ParamsYamlLoader, context.config_loader)
        self.mlflow_config = KedroMlflowConfig.model_validate(_load(loader, "mlflow"))
        if self.mlflow_config.tracking.experiment.name is None:
            self.mlflow_config.tracking.experiment.name = "almrr"
        context.__setattr__("mlflow", self.mlflow_config)
        settings = _load(loader, "tracking")
        self._required = bool(settings.get("required"))
        self._registers = bool(settings.get("register_models", True))
        self._parameters = loader.parameters
        self._project = Path(context.project_path)
        self._children: dict[str, str] = {}
        self._group: Experiment | None = None  # of a run that stands in that of an experiment
        self._datasets: set[tuple[str, str]] = set()  # runs and categories
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
        runs = sorted({str(n.namespace) for n in pipeline.nodes if _is_run(n.namespace)})
        named: list[str] = list(run_params.get("namespaces") or ())
        self._has_children = len(named) != 1 or len(runs) > 1
        self._stage = "+".join(run_params.get("pipeline_names") or ["all"])
        categories = list(dict.fromkeys(name.partition(".")[0] for name in named))
        name = f"{self._stage} {named[0]}" if len(named) == 1 else "+".join(names)
        name = self.mlflow_config.tracking.run.name or name
        is_report = self._stage == "report"
        if not self._existing() and (is_report or not self._has_children):
            self._group = Experiment.of(self._parameters.redacted(), self._project)
            self.run_id = self._begin_experiment(self._group)
            if not is_report:
                parent = self._start_child(runs[0]) if runs else self.run_id
                self.run_id = self._begin(name, parent=parent)
        else:
            self.run_id = self._begin(name)
        command = {key: run_params[key] for key in _COMMAND}
        # A runner is an object, whose address in memory would make all runs differ.
        given = {k: str(value) for k, value in run_params.items() if value and k != "runner"}
        given["kedro_command"] = _generate_kedro_command(**command, pipeline_names=names)
        self._put({"run": self.run_id, "tags": given})
        if not (self._group and is_report):
            of = categories or self._parameters.categories
            self._describe_run(self.run_id, of, map(_seed_of, runs))
        atexit.register(self._end_at_exit, os.getpid())

    @hook_impl
    def before_node_run(
        self, node: Node, catalog: DataCatalog, inputs: dict[str, Any], is_async: bool
    ) -> None:
        """In a run with children, let what a node logs go to the child of its category and seed."""
        self._catalog = catalog
        if self._is_mlflow_enabled:
            run = self._run_of(node.namespace)
            if run != self.run_id:
                self._running.add(run)
            live_run.set(lambda step, values: self._put(metrics_event(run, values, step)))

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        """Return to the parent run."""
        live_run.set(None)
        if self._is_mlflow_enabled:
            self._running.discard(self._run_of(node.namespace))

    @hook_impl
    def after_dataset_loaded(self, dataset_name: str, data: Any, node: Node) -> None:  # noqa: ANN401
        """Log a manifest as the data set that its images are."""
        category, _, name = dataset_name.rpartition(".")
        if name != "manifest" or not self._is_mlflow_enabled:
            return
        run = self._run_of(node.namespace)
        if (run, category) not in self._datasets:
            self._datasets.add((run, category))
            described = describe_dataset(category, data)
            self._put({"run": run, "dataset": described, "context": self._stage})

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:  # noqa: ANN401
        """Log metrics and files as they are found; a report's metrics also with the children."""
        if not self._is_mlflow_enabled:
            return
        namespace, _, name = dataset_name.rpartition(".")
        self._log_files(dataset_name, namespace, name)
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
        server, experiment = self.mlflow_config.server, self.mlflow_config.tracking.experiment
        is_own = server.mlflow_tracking_uri == own_database(self._project)
        if is_own:
            bring_home(self._project, experiment.name)
            experiment.create_experiment_kwargs.artifact_location = str(self._project / ARTIFACTS)
        self.mlflow_config.setup(context)
        found = experiment._experiment
        if is_own and KIND not in found.tags:
            server._mlflow_client.set_experiment_tag(found.experiment_id, KIND, MACHINE_LEARNING)
        return Connection(server._mlflow_client, found.experiment_id)

    def _put(self, event: dict[str, Any]) -> None:
        self._outbox.put(event)

    def _existing(self) -> str | None:
        """The run that kedro-mlflow's settings or MLflow name, to go on with."""
        active = mlflow.active_run()
        found: str | None = active.info.run_id if active else self.mlflow_config.tracking.run.id
        return found

    def _begin(self, name: str, *, parent: str | None = None, shared: str | None = None) -> str:
        """Start a run, or go on with an existing one or with one that processes share."""
        run = shared or secrets.token_hex(16)
        event = {"run": run, "start": now(), "name": name, "tags": resolve_tags()}
        if shared:
            event["shared"] = True
        if parent:
            event["parent"] = parent
        elif not shared and (existing := self._existing()):
            event["existing"] = existing
        self._put(event)
        return run

    def _begin_experiment(self, group: Experiment) -> str:
        """The run of an experiment, with all parameters and params.yaml."""
        run = self._begin(group.name, shared=group.run_id())
        every = self._parameters
        self._describe_run(run, every.categories, map(str, every.seeds), stage="experiment")
        self._put({"run": run, "artifacts": str(self._project / "params.yaml"), "to": ""})
        return run

    def _log_files(self, dataset_name: str, namespace: str, name: str) -> None:
        """Log what a dataset has written, to the run of its category and seed."""
        if name != "model" and name not in _ARTIFACTS:
            return
        stored = self._catalog.get(dataset_name)
        path = getattr(stored, "_path", None) or getattr(stored, "_filepath", None)
        if path is None:  # in memory
            return
        run = self._run_of(namespace)
        if name != "model" or not self._registers:
            self._put({"run": run, "artifacts": str(path), "to": _ARTIFACTS.get(name, name)})
            return
        from almrr_pipeline.inference import mlflow_model  # noqa: F401  not first by the delivery

        category, _, seed = namespace.partition(".")
        self._put({"run": run, "model": str(path), "name": category, "alias": seed})

    def _finish(self, status: str) -> None:
        if self._is_mlflow_enabled:
            for run in self._outbox.unfinished():
                is_child = self._has_children and run in self._children.values()
                done = is_child and run not in self._running
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

    def _run_of(self, namespace: str | None) -> str:
        """The run that a node or dataset logs to: this one, or a child if it has any."""
        is_child = self._has_children and _is_run(namespace)
        return self._start_child(str(namespace)) if is_child else self.run_id

    def _start_child(self, namespace: str) -> str:
        """The child run of a category and seed, begun if there is none."""
        if namespace not in self._children:
            shared = self._group.run_id(namespace) if self._group else None
            run = self._begin(namespace, parent=self.run_id, shared=shared)
            self._children[namespace] = run
            stage = "category" if shared else None
            category = namespace.partition(".")[0]
            self._describe_run(run, [category], [_seed_of(namespace)], stage=stage)
        return self._children[namespace]

    def _describe_run(
        self, run: str, categories: list[str], seeds: Iterable[str], *, stage: str | None = None
    ) -> None:
        """Log the parameters (of one category its own) and the tags of a run."""
        every = self._parameters
        own = every.for_category(categories[0]) if len(categories) == 1 else every
        self._put({"run": run, "params": flatten(own.redacted())})
        names = {"category": "+".join(categories), "seed": "+".join(dict.fromkeys(seeds))}
        tags = run_tags(self._project, stage=stage or self._stage, **names)
        self._put({"run": run, "tags": tags})


def _load(loader: ParamsYamlLoader, kind: str) -> dict[str, Any]:
    """Settings of conf/base/KIND*.yml; none, if there is no such file."""
    loader.config_patterns.setdefault(kind, [f"{kind}*", f"{kind}*/**", f"**/{kind}*"])
    try:
        return dict(loader[kind] or {})
    except MissingConfigException:
        return {}


def _is_run(namespace: str | None) -> bool:
    """Whether a namespace is that of a category and seed: CATEGORY.seed_N."""
    return "." in (namespace or "")


def _seed_of(namespace: str) -> str:
    return namespace.rpartition(".seed_")[2]
