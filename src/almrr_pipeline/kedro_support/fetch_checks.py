"""What would stop the fetching is found out before anything is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline

from almrr_pipeline.config import split_seed
from almrr_pipeline.kedro_support.config_loader import ParamsYamlLoader
from almrr_pipeline.pipelines.fetch.nodes import fetch_request
from almrr_pipeline.datasets.registry import check_request
from almrr_pipeline.datasets.weights import check_backbone


class FetchChecks:
    """Checks every category at the head of a run that fetches anything: Kedro runs independent nodes in any order."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Keep the parameters for the run to come."""
        self._parameters = cast(ParamsYamlLoader, context.config_loader).parameters

    @hook_impl(tryfirst=True)
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Raise AlmrrError, in one sentence, for whatever the run would otherwise meet half-way."""
        del run_params
        if not any("fetch" in node.tags for node in pipeline.nodes):
            return
        scratch: Path = catalog.load("scratch_folder")
        for category in self._parameters.categories:
            own = self._parameters.for_category(category)
            check_request([split_seed(category)[0]], request=fetch_request(own.data, scratch))
            check_backbone(name=own.backbone.name, weights=own.backbone.weights)
