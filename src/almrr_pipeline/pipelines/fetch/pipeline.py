"""dataset -> images -> manifest, per category; textures and backbone weights for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline

from almrr_pipeline.pipelines.fetch import nodes
from almrr_pipeline.pipelines.per_category import per_category, step


def create_pipeline(categories: Sequence[str]) -> Pipeline:
    """Two shared nodes, tagged `shared`, and a namespace per category."""
    shared = [
        step(nodes.download_textures, "params:data scratch_folder", "textures"),
        step(nodes.download_backbone, "params:backbone scratch_folder", "backbone_weights"),
    ]
    of_category = [
        step(nodes.download_images, "params:category params:data scratch_folder", "images"),
        step(nodes.list_images, "params:category images data_folder params:data", "manifest"),
    ]
    copies = per_category(of_category, categories, tags="fetch")
    return Pipeline(shared, tags={"fetch", "shared"}) + copies
