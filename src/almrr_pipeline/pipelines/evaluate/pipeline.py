"""model + test images -> anomaly maps -> scores, metrics, curves, overlays, for each category."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node, pipeline

from almrr_pipeline.pipelines.evaluate.nodes import draw_chosen_examples, map_anomalies, measure, score_images


def create_pipeline(categories: Sequence[str]) -> Pipeline:
    """A namespace per category."""
    return sum((_of_category(category) for category in categories), start=Pipeline([]))


def _of_category(category: str) -> Pipeline:
    return pipeline(
        [
            node(
                map_anomalies,
                ["model", "manifest", "data_folder", "params:scan", "params:evaluate"],
                "anomaly_maps",
            ),
            node(score_images, ["anomaly_maps", "manifest", "model", "data_folder"], "scores"),
            node(
                measure,
                ["anomaly_maps", "scores", "manifest", "model", "data_folder", "params:evaluate", "params:seed"],
                ["metrics", "roc_curve", "pr_curve", "pro_curve", "image_roc_curve", "image_pr_curve"],
            ),
            node(
                draw_chosen_examples,
                ["anomaly_maps", "scores", "manifest", "model", "data_folder", "params:report"],
                "overlays",
            ),
        ],
        namespace=category,
        inputs={"data_folder"},
    )
