"""A Kedro runner that lets the categories of a run train side by side on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline
from kedro.runner import AbstractRunner, SequentialRunner
from kedro.runner.task import Task
from pluggy import PluginManager

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.kedro_support.config_loader import requested_pipelines
from almrr_pipeline.kedro_support.engines import explain
from almrr_pipeline.kedro_support.hooks import ProjectHook
from almrr_pipeline.kedro_support.worker import working_for
from almrr_pipeline.scale.cluster import (
    check_sources,
    connected,
    passed_environment,
    prepare,
)
from almrr_pipeline.scale.side_by_side import run_side_by_side

if TYPE_CHECKING:  # it brings MLflow
    from almrr_pipeline.kedro_support.mlflow_hook import SharedRun, TrackingHook


@dataclass(frozen=True)
class Work:
    """The nodes of one namespace, and all that another process needs to run them as this one."""

    unit: str
    project: Path
    session: dict[str, Any]  # arguments of KedroSession.create
    requested: list[str] | None  # names of pipelines that `kedro run` was given
    nodes: Pipeline
    inputs: dict[str, Any]  # datasets in memory that other units have produced
    outputs: list[str]  # datasets in memory that other units take
    run: SharedRun | None  # of MLflow
    run_id: str | None  # of Kedro
    environment: dict[str, str]


class Done(NamedTuple):
    """What a unit of work leaves to others."""

    outputs: dict[str, Any]
    children: dict[str, str]  # runs of MLflow, by namespace


class RayRunner(AbstractRunner):
    """Runs each namespace (a category, or a category and seed) as one task of a Ray cluster.

    The cluster is that of RAY_ADDRESS, else one of this machine's cores and GPUs. What a task asks
    for is in the parameters, `scale`. Nodes without a namespace run in this process. A task whose
    process or machine dies is run again, and its training goes on from the last checkpoint.

    Raises:
        AlmrrError: at the end, if units failed: names them, the reasons, and what was not reached.
    """

    def _get_executor(self, max_workers: int) -> Executor | None:
        return None

    def _run(
        self,
        pipeline: Pipeline,
        catalog: DataCatalog,  # type: ignore[override]  # Kedro's protocol has less
        hook_manager: PluginManager | None = None,
        run_id: str | None = None,
    ) -> None:
        assert hook_manager is not None
        units, needs = _divide(pipeline)
        project = _find_plugin(hook_manager, ProjectHook)
        settings, context = project.parameters.scale, project.context
        tracking = find_tracking(hook_manager)
        with connected() as ray:
            share = prepare(ray, Path(context.project_path), settings)
            if any("fetch" in node.tags for node in pipeline.nodes):
                check_sources(ray, project.parameters.data)
            task = ray.remote(run_work)
            asked = {"num_cpus": share.cpus, "num_gpus": share.gpus}

            def start(unit: str) -> Future[Done] | None:
                nodes = units[unit]
                if not nodes.nodes[0].namespace:
                    Task(nodes.nodes[0], catalog, self._is_async, hook_manager, run_id).execute()
                    return None
                work = Work(
                    unit=unit,
                    project=Path(context.project_path),
                    session={
                        "env": context.env,
                        "runtime_params": context._runtime_params,
                        "conf_source": context.config_loader.conf_source,
                    },
                    requested=requested_pipelines(),
                    nodes=nodes,
                    inputs=_load_inputs(nodes, pipeline, catalog),
                    outputs=_list_outputs(unit, units, catalog),
                    run=tracking.share() if tracking else None,
                    run_id=run_id,
                    environment=passed_environment(),
                )
                self._logger.info("%s: started", unit)
                ready = task.options(name=unit, max_retries=settings.retries, **asked)
                future: Future[Done] = ready.remote(work).future()
                return future

            def finish(unit: str, done: Done) -> None:
                for name, value in done.outputs.items():
                    catalog.save(name, value)
                if tracking:
                    tracking.add_children(done.children)
                self._logger.info("%s: finished", unit)

            failures = run_side_by_side(needs, start, finish)
        if failures:
            raise AlmrrError(_list_failures(failures, needs))


def _load_inputs(nodes: Pipeline, pipeline: Pipeline, catalog: DataCatalog) -> dict[str, Any]:
    """What other units have left in memory for this one."""
    handed_over = nodes.inputs() & pipeline.all_outputs()
    return {name: catalog.load(name) for name in handed_over if _is_in_memory(catalog, name)}


def _list_outputs(unit: str, units: Mapping[str, Pipeline], catalog: DataCatalog) -> list[str]:
    """What this unit leaves in memory for others."""
    return [
        name
        for name in units[unit].all_outputs()
        if _is_in_memory(catalog, name) and _is_taken(name, unit, units)
    ]


def run_work(work: Work) -> Done:
    """Run one unit in this process, in a session of Kedro that equals the driver's."""
    with working_for(work.unit, work.project, work.environment):
        bootstrap_project(work.project)
        pipelines.set_requested(work.requested)
        created: Any = KedroSession.create(work.project, **work.session)
        with created as session:
            context = session.load_context()
            context._pipelines_to_validate = list(work.requested or ["__default__"])
            catalog: Any = context.catalog
            for name, value in work.inputs.items():
                catalog[name] = MemoryDataset(value, copy_mode="assign")
            hooks = session._hook_manager
            tracking = find_tracking(hooks)
            joined = tracking.join(work.run) if tracking and work.run else nullcontext()
            with joined:
                SequentialRunner().run(work.nodes, catalog, hooks, work.run_id)
            outputs = {name: catalog.load(name) for name in work.outputs}
            return Done(outputs, tracking.children if tracking and work.run else {})


def _divide(pipeline: Pipeline) -> tuple[dict[str, Pipeline], dict[str, set[str]]]:
    """Nodes by namespace, those without one each for itself; and which units need which."""
    unit_of = {node: node.namespace or node.name for node in pipeline.nodes}
    units: dict[str, list[Any]] = {}
    needs: dict[str, set[str]] = {}
    for node, unit in unit_of.items():
        units.setdefault(unit, []).append(node)
        needed = {unit_of[other] for other in pipeline.node_dependencies[node]}
        needs.setdefault(unit, set()).update(needed - {unit})
    return {unit: Pipeline(nodes) for unit, nodes in units.items()}, needs


def _is_in_memory(catalog: DataCatalog, name: str) -> bool:
    return isinstance(catalog.get(name), MemoryDataset)


def _is_taken(name: str, unit: str, units: Mapping[str, Pipeline]) -> bool:
    return any(name in nodes.inputs() for other, nodes in units.items() if other != unit)


def _find_plugin(hook_manager: PluginManager, kind: type[ProjectHook]) -> ProjectHook:
    return next(one for one in hook_manager.get_plugins() if isinstance(one, kind))


def find_tracking(hook_manager: PluginManager) -> TrackingHook | None:
    """The hook that logs to MLflow; None in a run that is not tracked."""
    found = (one for one in hook_manager.get_plugins() if type(one).__name__ == "TrackingHook")
    return next(found, None)


def _list_failures(failures: Mapping[str, Exception], needs: Mapping[str, set[str]]) -> str:
    """Each failed unit with its reason, and how many others did not run because of it."""
    reached = set(failures)
    lost: list[str] = []
    for unit in needs:  # in the order of the pipeline, so that what is needed comes first
        if unit not in reached and needs[unit] & reached:
            lost.append(unit)
            reached.add(unit)
    lines = [f"{unit}: {explain(error)}" for unit, error in failures.items()]
    finished = len(needs) - len(failures) - len(lost)
    text = f"{len(failures)} of {len(needs)} parts of the run failed, {finished} are finished"
    text += f", {len(lost)} need a failed one ({', '.join(lost)})" if lost else ""
    return "\n  ".join([f"{text}:", *lines])
