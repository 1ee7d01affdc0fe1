"""synthetic set + backbone -> model, per category and seed."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline

from almrr_pipeline.pipelines.per_category import per_category, step
from almrr_pipeline.pipelines.train import nodes


def create_pipeline(categories: Sequence[str], seeds: Sequence[int]) -> Pipeline:
    """A namespace per category and seed."""
    run = "params:category params:seed scratch_folder"
    steps = [
        step(
            nodes.build_model,
            "backbone_weights params:backbone params:data params:model params:inference "
            "params:seed",
            "untrained_network",
        ),
        step(
            nodes.fit_model,
            f"untrained_network synthetic_set manifest backbone_weights params:train {run}",
            "trained_network history",
        ),
        step(
            nodes.calibrate_thresholds,
            "trained_network history manifest data_folder params:data params:inference "
            "params:category",
            "inference_config",
        ),
        step(nodes.save_model, "trained_network history inference_config scratch_folder", "model"),
        step(nodes.remove_checkpoints, f"model {run}", ""),
    ]
    return per_category(steps, categories, seeds)
