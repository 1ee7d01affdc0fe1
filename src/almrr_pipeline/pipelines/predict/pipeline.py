"""model + images of one's own -> overlays and scores, for each category and seed."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Node, Pipeline

from almrr_pipeline.pipelines.per_category import per_category
from almrr_pipeline.pipelines.predict.nodes import predict_images


def create_pipeline(categories: Sequence[str], seeds: Sequence[int]) -> Pipeline:
    """A namespace per category and seed."""
    node = Node(
        predict_images,
        ["model", "params:predict", "params:inference", "scratch_folder"],
        "predictions",
        name="predict_images",
    )
    return per_category([node], categories, seeds)
