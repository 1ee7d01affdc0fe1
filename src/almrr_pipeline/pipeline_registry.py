"""The pipelines that `kedro run` knows, for the categories and seeds of params.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from kedro.pipeline import Pipeline

from almrr_pipeline.config import load_parameters
from almrr_pipeline.datasets.registry import dataset_for
from almrr_pipeline.kedro_support.config_loader import project_root, requested_pipelines
from almrr_pipeline.pipelines.per_category import per_category

STAGES = ("fetch", "synthesize", "train", "baseline", "evaluate", "report")


def register_pipelines() -> dict[str, Pipeline]:
    """The pipelines that `kedro run` names; without a name all, from fetch to report.

    Raises:
        AlmrrError: params.yaml is wrong, or names a category that no dataset has.
    """
    parameters = load_parameters(project_root() / "params.yaml")
    for category in parameters.categories:
        dataset_for(category)  # an unknown one ends the run here, before any work
    return build_pipelines(parameters.categories, parameters.seeds, requested_pipelines())


def build_pipelines(
    categories: Sequence[str], seeds: Sequence[int], names: Sequence[str] | None = None
) -> dict[str, Pipeline]:
    """Pipelines by name: a namespace per category (fetch), or per category and seed.

    Only the modules of `names`, by default of all, are imported: train and evaluate bring torch.
    """
    known = (*STAGES, "predict")
    chosen = (
        known
        if names is None or "__default__" in names
        else [name for name in known if name in names]
    )
    built = {name: _build(name, categories, seeds) for name in chosen}
    if set(known) <= set(built):
        built["__default__"] = sum((built[name] for name in STAGES), start=Pipeline([]))
    return built


def _build(name: str, categories: Sequence[str], seeds: Sequence[int]) -> Pipeline:
    stage = import_module(f"almrr_pipeline.pipelines.{name}")
    if name == "fetch":
        shared = Pipeline(stage.SHARED_NODES, tags={"fetch", "shared"})
        return shared + per_category(stage.NODES, categories, tags="fetch")
    if name == "baseline":
        return per_category(stage.NODES, categories)
    pipeline = per_category(stage.NODES, categories, seeds)
    if name == "report":
        pipeline += Pipeline(stage.summarizing_nodes(categories, seeds))
    return pipeline
