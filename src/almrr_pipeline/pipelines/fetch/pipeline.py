"""dataset -> images -> manifest, for each category; textures and backbone weights for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Node, Pipeline

from almrr_pipeline.pipelines.fetch import nodes
from almrr_pipeline.pipelines.per_category import per_category


def create_pipeline(categories: Sequence[str]) -> Pipeline:
    """Two shared nodes, tagged `shared`, and a namespace per category."""
    textures = Node(
        nodes.download_textures,
        ["params:data", "scratch_folder"],
        "textures",
        name="fetch_textures",
    )
    backbone = Node(
        nodes.download_backbone,
        ["params:backbone", "scratch_folder"],
        "backbone_weights",
        name="fetch_backbone",
    )
    images = Node(
        nodes.download_images,
        ["params:category", "params:data", "scratch_folder"],
        "images",
        name="fetch_images",
    )
    manifest = Node(
        nodes.list_images,
        ["params:category", "images", "data_folder", "params:data"],
        "manifest",
        name="build_manifest",
    )
    shared = Pipeline([textures, backbone], tags={"fetch", "shared"})
    return shared + per_category([images, manifest], categories, tags="fetch")
