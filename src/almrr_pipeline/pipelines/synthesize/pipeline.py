"""manifest + textures -> synthetic set, for each category and seed."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Node, Pipeline

from almrr_pipeline.pipelines.per_category import per_category
from almrr_pipeline.pipelines.synthesize.nodes import simulate_anomalies


def create_pipeline(categories: Sequence[str], seeds: Sequence[int]) -> Pipeline:
    """A namespace per category and seed."""
    node = Node(
        simulate_anomalies,
        [
            "manifest",
            "textures",
            "data_folder",
            "params:data",
            "params:synthesis",
            "params:seed",
            "scratch_folder",
        ],
        "synthetic_set",
        name="simulate_anomalies",
    )
    return per_category([node], categories, seeds)
