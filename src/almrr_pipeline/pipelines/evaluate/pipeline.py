"""model + test images -> maps -> scores, metrics, curves, overlays, per category and seed."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline

from almrr_pipeline.pipelines.evaluate import nodes
from almrr_pipeline.pipelines.per_category import per_category, step


def create_pipeline(categories: Sequence[str], seeds: Sequence[int]) -> Pipeline:
    """A namespace per category and seed.

    Maps and overlays are written as partitions and read as a folder: two entries of the catalog.
    """
    maps = "anomaly_maps@folder"
    steps = [
        step(nodes.open_test_set, "model manifest data_folder", "test_set"),
        step(nodes.predict_maps, "model test_set params:inference", "anomaly_maps@partitions"),
        step(nodes.score_images, f"{maps} test_set", "scores"),
        step(
            nodes.compute_metrics,
            f"{maps} scores test_set params:evaluate params:seed",
            "metrics curves",
        ),
        step(nodes.draw_overlays, f"{maps} scores test_set params:report", "overlays@partitions"),
    ]
    return per_category(steps, categories, seeds)
