"""Kedro hook: checks before a fetch, a few lines in the log, and MLflow where a run is tracked."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock
from kedro.config import MissingConfigException
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from almrr_pipeline.config import Parameters
from almrr_pipeline.kedro_support.config_loader import ParamsYamlLoader, requested_pipelines
from almrr_pipeline.kedro_support.tracking import helps_another_process
from almrr_pipeline.kedro_support.worker import importing_mlflow

if TYPE_CHECKING:
    from almrr_pipeline.kedro_support.mlflow_hook import TrackingHook

logger = logging.getLogger(__name__)
_ADVICE = "One or more dataset names contain '.' characters"  # they are namespaces


class ProjectHook:
    """Checks what is to be fetched, and adds `TrackingHook` for a run that MLflow shall know.

    It logs one line at the end of a run, and the nodes' names where several categories take turns;
    conf/logging.yml leaves out Kedro's own lines, a dozen for each node.

    MLflow takes seconds to import: a run of pipelines that mlflow.yml disables goes without.
    """

    __name__ = "mlflow_hook"  # kedro-mlflow's entry point: a name that is taken is not imported
    _begun = 0.0
    _takes_turns = False
    _tracking: TrackingHook | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Keep parameters and context for the run to come; in the main process, set tracking up.

        Only one process at a time can create or migrate the database: stages may run side by side.
        """
        loader = cast(ParamsYamlLoader, context.config_loader)
        self.parameters, self.context = loader.parameters, context
        # Not in settings.py: Kedro reads that with filters of its own.
        warnings.filterwarnings("ignore", _ADVICE)
        if helps_another_process() or not _is_tracked(loader):
            return
        with importing_mlflow():
            from almrr_pipeline.kedro_support.mlflow_hook import TrackingHook  # slow: brings MLflow

        tracking, scratch = TrackingHook(), Path(context.project_path, ".almrr")
        scratch.mkdir(exist_ok=True)
        with FileLock(scratch / "mlflow.lock"):
            tracking.after_context_created(context)
        context._hook_manager.register(tracking)
        self._tracking = tracking

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Check a fetch."""
        self._begun = time.monotonic()
        several = len({node.namespace for node in pipeline.nodes}) > 1
        self._takes_turns = several and requested_pipelines() != ["report"]  # that takes seconds
        if any("fetch" in node.tags for node in pipeline.nodes):
            _check_fetch(self.parameters, catalog)

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Name the node, if lines of several categories follow each other."""
        if self._takes_turns and node.namespace:
            logger.info("%s", node.name)

    @hook_impl
    def after_pipeline_run(self, pipeline: Pipeline) -> None:
        """Tell how long it took, and where MLflow shows it."""
        page = self._tracking.delivery.find_page() if self._tracking else None
        line = f"{len(pipeline.nodes)} nodes in {time.monotonic() - self._begun:.1f} s."
        logger.info("%s", f"{line} {page}" if page else line)


def _is_tracked(loader: ParamsYamlLoader) -> bool:
    """Whether one of the pipelines that are asked for is tracked; all are, if none is named."""
    loader.config_patterns.setdefault("mlflow", ["mlflow*", "mlflow*/**", "**/mlflow*"])
    try:
        tracking: dict[str, Any] = loader["mlflow"].get("tracking") or {}
    except MissingConfigException:
        return True
    disabled = (tracking.get("disable_tracking") or {}).get("pipelines") or []
    return not set(requested_pipelines() or ["__default__"]) <= set(disabled)


def _check_fetch(parameters: Parameters, catalog: DataCatalog) -> None:
    """Raise AlmrrError, in one sentence, for whatever a fetch would otherwise meet half-way.

    All categories are checked before anything is fetched: Kedro's order of nodes is open.
    """
    from almrr_pipeline.datasets.base import FetchRequest
    from almrr_pipeline.datasets.registry import check_request
    from almrr_pipeline.datasets.weights import check_backbone

    downloads = catalog.load("scratch_folder") / "downloads"
    check_request(parameters.categories, request=FetchRequest(downloads, parameters.data))
    check_backbone(parameters.backbone)
