"""The train pipeline: synthetic set + backbone -> model, with thresholds from validation images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import torch

from almrr_pipeline.common.files import staging_folder
from almrr_pipeline.common.region import from_file
from almrr_pipeline.config import (
    BackboneSettings,
    DataSettings,
    InferenceSettings,
    ModelSettings,
    TrainSettings,
)
from almrr_pipeline.datasets.manifest import image_reading, training_split
from almrr_pipeline.inference.calibration import calibrate
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.map_predictor import MapPredictor
from almrr_pipeline.kedro_support.tracking import live_logger
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone
from almrr_pipeline.pipelines.per_category import step
from almrr_pipeline.synthesis.synthetic_set import SyntheticSet
from almrr_pipeline.training.callbacks import METRIC
from almrr_pipeline.training.checkpoints import Resuming, fingerprint, source_files
from almrr_pipeline.training.runtime import isolated_randomness
from almrr_pipeline.training.train import fit


def build_model(
    backbone_weights: Path,
    backbone: BackboneSettings,
    data: DataSettings,
    model: ModelSettings,
    inference: InferenceSettings,
    seed: int,
) -> ALMRR:
    """Build the model around the frozen backbone; its initial weights derive from the seed."""
    frozen = build_backbone(backbone, weights=backbone_weights / "backbone.safetensors")
    with isolated_randomness():
        torch.manual_seed(seed)
        return ALMRR(frozen, model, image_size=data.image_size, scan_backend=inference.scan_backend)


def fit_model(
    untrained: ALMRR,
    synthetic_set: SyntheticSet,
    manifest: pd.DataFrame,
    backbone_weights: Path,
    train: TrainSettings,
    category: str,
    seed: int,
    scratch: Path,
) -> tuple[ALMRR, pd.DataFrame]:
    """Train, or resume an interrupted training of equal parameters, data and code.

    Raises:
        SystemExit: with status 0, in all processes of a distributed training but the main one.
    """
    data_and_code = fingerprint(
        {"images": list(manifest["sha256"]), "synthetic_set": synthetic_set.description},
        [backbone_weights / "backbone.json", *source_files()],
    )
    history = fit(
        untrained,
        synthetic_set,
        train,
        seed=seed,
        specimens=dict(zip(manifest["image"], manifest["specimen"], strict=True)),
        # The last checkpoint stays until the model is in its place, see remove_checkpoints.
        resuming=Resuming(_checkpoint_folder(scratch, category, seed), data_and_code, keep=True),
        on_metrics=live_logger(),
    )
    if history is None:  # not the main process of a distributed training, which does the rest
        raise SystemExit(0)
    return untrained, history


def calibrate_thresholds(
    trained: ALMRR,
    history: pd.DataFrame,
    manifest: pd.DataFrame,
    region_file: bytes,
    data_folder: Path,
    data: DataSettings,
    inference: InferenceSettings,
    category: str,
) -> InferenceConfig:
    """Choose the thresholds on validation images, which were not trained on.

    Where the weights were chosen on these images too, the thresholds lose their guarantee.
    """
    _, validation = training_split(manifest, fraction=data.validation_fraction)
    reading, region = image_reading(manifest, data), from_file(region_file)
    thresholds = calibrate(
        MapPredictor.build(trained, inference, tiling=data.tiling, reading=reading, region=region),
        [data_folder / name for name in validation],
        smoothing=inference.smoothing,
        false_alarm_rate=inference.false_alarm_rate,
    )
    config = InferenceConfig(
        category=category,
        image_size=data.image_size,
        tiling=data.tiling,
        reading=reading,
        region=region,
        smoothing=inference.smoothing,
        flips=inference.flips,
        thresholds=thresholds,
    )
    return config.without_guarantee() if METRIC in history else config


def save_model(
    trained: ALMRR, history: pd.DataFrame, inference_config: InferenceConfig, scratch: Path
) -> Path:
    """Write weights, architecture, history and thresholds, all that prediction needs."""
    with staging_folder(scratch) as folder:
        trained.save(folder)
        inference_config.save(folder)
        history.to_csv(folder / "history.csv", index=False)
    return folder


def remove_checkpoints(model: Path, category: str, seed: int, scratch: Path) -> None:
    """Remove the checkpoints, once the finished model is in its place."""
    shutil.rmtree(_checkpoint_folder(scratch, category, seed), ignore_errors=True)


def _checkpoint_folder(scratch: Path, category: str, seed: int) -> Path:
    return scratch / "training" / category / f"seed_{seed}"


_RUN = "params:category params:seed scratch_folder"
NODES = [
    step(
        build_model,
        "backbone_weights params:backbone params:data params:model params:inference params:seed",
        "untrained_network",
    ),
    step(
        fit_model,
        f"untrained_network synthetic_set manifest backbone_weights params:train {_RUN}",
        "trained_network history",
    ),
    step(
        calibrate_thresholds,
        "trained_network history manifest region_file data_folder params:data params:inference "
        "params:category",
        "inference_config",
    ),
    step(save_model, "trained_network history inference_config scratch_folder", "model"),
    step(remove_checkpoints, f"model {_RUN}", ""),
]
