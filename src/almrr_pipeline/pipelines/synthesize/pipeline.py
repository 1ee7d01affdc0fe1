"""manifest + textures -> synthetic set, per category and seed."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline

from almrr_pipeline.pipelines.per_category import per_category, step
from almrr_pipeline.pipelines.synthesize.nodes import simulate_anomalies


def create_pipeline(categories: Sequence[str], seeds: Sequence[int]) -> Pipeline:
    """A namespace per category and seed."""
    images = "manifest textures data_folder"
    settings = "params:data params:synthesis params:seed scratch_folder"
    nodes = [step(simulate_anomalies, f"{images} {settings}", "synthetic_set")]
    return per_category(nodes, categories, seeds)
