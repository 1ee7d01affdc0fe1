"""manifest + textures -> synthetic set, for each category."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node, pipeline

from almrr_pipeline.pipelines.synthesize.nodes import simulate


def create_pipeline(categories: Sequence[str]) -> Pipeline:
    """A namespace per category."""
    return sum((_of_category(category) for category in categories), start=Pipeline([]))


def _of_category(category: str) -> Pipeline:
    return pipeline(
        [
            node(
                simulate,
                ["manifest", "textures", "data_folder", "params:data", "params:synthesis", "params:seed"],
                "synthetic_set",
            )
        ],
        namespace=category,
        inputs={"textures", "data_folder"},
    )
