"""The pipelines that `kedro run` knows, for the categories and seeds of params.yaml."""

from __future__ import annotations

from kedro.pipeline import Pipeline

from almrr_pipeline.config import load_parameters
from almrr_pipeline.datasets.registry import dataset_for
from almrr_pipeline.kedro_support.config_loader import project_root
from almrr_pipeline.pipelines.evaluate import pipeline as evaluate
from almrr_pipeline.pipelines.fetch import pipeline as fetch
from almrr_pipeline.pipelines.predict import pipeline as predict
from almrr_pipeline.pipelines.report import pipeline as report
from almrr_pipeline.pipelines.synthesize import pipeline as synthesize
from almrr_pipeline.pipelines.train import pipeline as train


def register_pipelines() -> dict[str, Pipeline]:
    """All pipelines by name; `kedro run` without a name runs everything from fetch to report.

    Raises:
        AlmrrError: params.yaml is wrong, or names a category that no dataset has.
    """
    parameters = load_parameters(project_root() / "params.yaml")
    categories, seeds = parameters.categories, parameters.seeds
    for category in categories:
        dataset_for(category)  # an unknown one ends the run here, before any work
    stages = {
        "fetch": fetch.create_pipeline(categories),
        "synthesize": synthesize.create_pipeline(categories, seeds),
        "train": train.create_pipeline(categories, seeds),
        "evaluate": evaluate.create_pipeline(categories, seeds),
        "report": report.create_pipeline(categories, seeds),
    }
    return {
        **stages,
        "predict": predict.create_pipeline(categories, seeds),
        "__default__": sum(stages.values(), start=Pipeline([])),
    }
