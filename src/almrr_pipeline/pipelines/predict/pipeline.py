"""model + images of one's own -> overlays and scores, per category and seed."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline

from almrr_pipeline.pipelines.per_category import per_category, step
from almrr_pipeline.pipelines.predict.nodes import predict_images


def create_pipeline(categories: Sequence[str], seeds: Sequence[int]) -> Pipeline:
    """A namespace per category and seed."""
    inputs = "model params:predict params:inference scratch_folder"
    return per_category([step(predict_images, inputs, "predictions")], categories, seeds)
