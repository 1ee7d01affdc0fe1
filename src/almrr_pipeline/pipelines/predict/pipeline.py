"""model + images of one's own -> overlays and scores, for each category."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node, pipeline

from almrr_pipeline.pipelines.predict.nodes import predict_images


def create_pipeline(categories: Sequence[str]) -> Pipeline:
    """A namespace per category."""
    return sum((_of_category(category) for category in categories), start=Pipeline([]))


def _of_category(category: str) -> Pipeline:
    inputs = ["model", "params:predict", "params:scan", "params:evaluate"]
    return pipeline([node(predict_images, inputs, "predictions")], namespace=category)
