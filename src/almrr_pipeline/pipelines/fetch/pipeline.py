"""source -> images -> manifest, for each category; textures and backbone weights for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node, pipeline

from almrr_pipeline.pipelines.fetch.nodes import (
    list_images,
    request_backbone_weights,
    request_images,
    request_textures,
)


def create_pipeline(categories: Sequence[str]) -> Pipeline:
    """Two shared steps, tagged `shared`, and a namespace per category."""
    shared = pipeline(
        [
            node(request_textures, ["params:data", "scratch_folder"], "textures"),
            node(request_backbone_weights, "params:backbone", "backbone_weights"),
        ],
        tags={"fetch", "shared"},
    )
    return sum((_of_category(category) for category in categories), start=shared)


def _of_category(category: str) -> Pipeline:
    return pipeline(
        [
            node(request_images, ["params:category", "params:data", "scratch_folder"], "images"),
            node(list_images, ["params:category", "images", "data_folder", "params:data"], "manifest"),
        ],
        namespace=category,
        tags="fetch",
        inputs={"data_folder", "scratch_folder"},
    )
