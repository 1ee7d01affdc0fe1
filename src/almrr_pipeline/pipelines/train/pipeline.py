"""synthetic set + backbone -> model, for each category and seed."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Node, Pipeline

from almrr_pipeline.pipelines.per_category import per_category
from almrr_pipeline.pipelines.train import nodes


def create_pipeline(categories: Sequence[str], seeds: Sequence[int]) -> Pipeline:
    """A namespace per category and seed."""
    build = Node(
        nodes.build_model,
        [
            "backbone_weights",
            "params:backbone",
            "params:data",
            "params:model",
            "params:inference",
            "params:seed",
        ],
        "untrained_network",
        name="build_model",
    )
    fit = Node(
        nodes.fit_model,
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
        ["trained_network", "history"],
        name="fit_model",
    )
    calibrate = Node(
        nodes.calibrate_thresholds,
        [
            "trained_network",
            "history",
            "manifest",
            "data_folder",
            "params:data",
            "params:inference",
            "params:category",
        ],
        "inference_config",
        name="calibrate_thresholds",
    )
    save = Node(
        nodes.save_model,
        ["trained_network", "history", "inference_config", "scratch_folder"],
        "model",
        name="save_model",
    )
    remove = Node(
        nodes.remove_checkpoints,
        ["model", "params:category", "params:seed", "scratch_folder"],
        None,
        name="remove_checkpoints",
    )
    return per_category([build, fit, calibrate, save, remove], categories, seeds)
