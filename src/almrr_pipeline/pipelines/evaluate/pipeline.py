"""model + test images -> anomaly maps -> scores, metrics, curves, overlays, for each category and seed."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Node, Pipeline

from almrr_pipeline.pipelines.evaluate import nodes
from almrr_pipeline.pipelines.per_category import per_category


def create_pipeline(categories: Sequence[str], seeds: Sequence[int]) -> Pipeline:
    """A namespace per category and seed.

    Maps and overlays are written as partitions and read as a folder: two entries of the catalog for one place.
    """
    predict = Node(
        nodes.predict_maps,
        ["model", "manifest", "data_folder", "params:inference"],
        "anomaly_maps@partitions",
        name="predict_maps",
    )
    score = Node(
        nodes.score_images,
        ["anomaly_maps@folder", "manifest", "model", "data_folder"],
        "scores",
        name="score_images",
    )
    measure = Node(
        nodes.compute_metrics,
        [
            "anomaly_maps@folder",
            "scores",
            "manifest",
            "model",
            "data_folder",
            "params:evaluate",
            "params:seed",
        ],
        ["metrics", "curves"],
        name="compute_metrics",
    )
    draw = Node(
        nodes.draw_overlays,
        [
            "anomaly_maps@folder",
            "scores",
            "manifest",
            "model",
            "data_folder",
            "params:report",
        ],
        "overlays@partitions",
        name="draw_overlays",
    )
    return per_category([predict, score, measure, draw], categories, seeds)
