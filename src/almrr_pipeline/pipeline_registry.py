"""The pipelines that `kedro run` knows, for the categories and seeds of params.yaml."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline

from almrr_pipeline.config import load_parameters
from almrr_pipeline.datasets.registry import dataset_for
from almrr_pipeline.kedro_support.config_loader import project_root
from almrr_pipeline.pipelines import evaluate, fetch, predict, report, synthesize, train
from almrr_pipeline.pipelines.per_category import per_category


def register_pipelines() -> dict[str, Pipeline]:
    """All pipelines by name; `kedro run` without a name runs everything from fetch to report.

    Raises:
        AlmrrError: params.yaml is wrong, or names a category that no dataset has.
    """
    parameters = load_parameters(project_root() / "params.yaml")
    for category in parameters.categories:
        dataset_for(category)  # an unknown one ends the run here, before any work
    return build_pipelines(parameters.categories, parameters.seeds)


def build_pipelines(categories: Sequence[str], seeds: Sequence[int]) -> dict[str, Pipeline]:
    """All pipelines by name: a namespace per category (fetch), or per category and seed."""
    shared = Pipeline(fetch.SHARED_NODES, tags={"fetch", "shared"})
    summary = Pipeline(report.summarizing_nodes(categories, seeds))
    stages = {
        "fetch": shared + per_category(fetch.NODES, categories, tags="fetch"),
        "synthesize": per_category(synthesize.NODES, categories, seeds),
        "train": per_category(train.NODES, categories, seeds),
        "evaluate": per_category(evaluate.NODES, categories, seeds),
        "report": per_category(report.NODES, categories, seeds) + summary,
    }
    return {
        **stages,
        "predict": per_category(predict.NODES, categories, seeds),
        "__default__": sum(stages.values(), start=Pipeline([])),
    }
