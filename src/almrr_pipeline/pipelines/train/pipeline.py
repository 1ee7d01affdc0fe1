"""synthetic set + backbone -> model, for each category."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node, pipeline

from almrr_pipeline.pipelines.train.nodes import (
    assemble_network,
    find_thresholds,
    fit_network,
    forget_checkpoints,
    pack_model,
)


def create_pipeline(categories: Sequence[str]) -> Pipeline:
    """A namespace per category."""
    return sum((_of_category(category) for category in categories), start=Pipeline([]))


def _of_category(category: str) -> Pipeline:
    return pipeline(
        [
            node(
                assemble_network,
                ["backbone_weights", "params:backbone", "params:data", "params:model", "params:scan", "params:seed"],
                "untrained_network",
            ),
            node(
                fit_network,
                [
                    "untrained_network",
                    "synthetic_set",
                    "manifest",
                    "backbone_weights",
                    "params:train",
                    "params:category",
                    "params:seed",
                    "scratch_folder",
                ],
                ["network", "history"],
            ),
            node(
                find_thresholds,
                [
                    "network",
                    "manifest",
                    "data_folder",
                    "params:data",
                    "params:threshold",
                    "params:evaluate",
                    "params:category",
                ],
                "inference",
            ),
            node(pack_model, ["network", "history", "inference"], "model"),
            node(forget_checkpoints, ["model", "params:category", "scratch_folder"], None),
        ],
        namespace=category,
        inputs={"backbone_weights", "data_folder", "scratch_folder"},
    )
