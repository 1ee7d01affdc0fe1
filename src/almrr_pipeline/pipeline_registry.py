"""The pipelines that `kedro run` knows; the categories they run on are those of params.yaml."""

from __future__ import annotations

from kedro.pipeline import Pipeline

from almrr_pipeline.config import load_parameters, split_seed
from almrr_pipeline.pipelines import evaluate, fetch, predict, report, synthesize, train
from almrr_pipeline.kedro_support.project import project_root
from almrr_pipeline.datasets.registry import source_for


def register_pipelines() -> dict[str, Pipeline]:
    """All pipelines by name; `kedro run` without a name runs everything from fetch to report.

    Raises:
        AlmrrError: params.yaml is wrong, or names a category that no source knows.
    """
    categories = load_parameters(project_root() / "params.yaml").categories
    for category in categories:
        source_for(split_seed(category)[0])  # an unknown one ends the run here, before any work
    stages = {
        "fetch": fetch.create_pipeline(categories),
        "synthesize": synthesize.create_pipeline(categories),
        "train": train.create_pipeline(categories),
        "evaluate": evaluate.create_pipeline(categories),
        "report": report.create_pipeline(categories),
    }
    return {
        **stages,
        "predict": predict.create_pipeline(categories),
        "__default__": sum(stages.values(), start=Pipeline([])),
    }
