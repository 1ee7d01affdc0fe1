"""Steps of the train pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import mlflow
import pandas as pd
import torch

from almrr_pipeline.config import (
    BackboneSettings,
    DataSettings,
    EvaluateSettings,
    ModelSettings,
    ScanSettings,
    ThresholdSettings,
    TrainSettings,
)
from almrr_pipeline.inference.calibration import calibrate
from almrr_pipeline.inference.tta import average_flips
from almrr_pipeline.inference.predictor import resolve_device
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone
from almrr_pipeline.kedro_support.datasets import FillsFolder
from almrr_pipeline.datasets.manifest import training_split
from almrr_pipeline.synthesis.synthetic_set import SyntheticSet
from almrr_pipeline.training.checkpoints import fingerprint, source_files
from almrr_pipeline.training.train import fit
from almrr_pipeline.training.randomness import isolated_randomness
from almrr_pipeline.training.selection import METRIC


def assemble_network(
    backbone_weights: Path,
    backbone: BackboneSettings,
    data: DataSettings,
    model: ModelSettings,
    scan: ScanSettings,
    seed: int,
) -> ALMRR:
    """Build the untrained network around the frozen backbone; its initial weights derive from the seed."""
    frozen = build_backbone(backbone, weights=backbone_weights / "backbone.safetensors")
    with isolated_randomness():
        torch.manual_seed(seed)
        return ALMRR(frozen, model, image_size=data.image_size, scan_backend=scan.backend)


def fit_network(
    network: ALMRR,
    synthetic_set: SyntheticSet,
    manifest: pd.DataFrame,
    backbone_weights: Path,
    train: TrainSettings,
    category: str,
    seed: int,
    scratch: Path,
) -> tuple[ALMRR, pd.DataFrame]:
    """Train; an interrupted training of equal parameters, data and code goes on where its last checkpoint stands."""
    data_and_code = fingerprint(
        {"images": list(manifest["sha256"]), "synthetic_set": synthetic_set.description},
        [backbone_weights / "backbone.json", *source_files()],
    )
    history = fit(
        network,
        synthetic_set,
        train,
        seed=seed,
        scratch=_checkpoints(scratch, category),
        fingerprint=data_and_code,
        on_metrics=_log_live,
        keep_checkpoints=True,  # until the model lies in its place, see forget_checkpoints
    )
    return network, history


def find_thresholds(
    network: ALMRR,
    manifest: pd.DataFrame,
    data_folder: Path,
    data: DataSettings,
    threshold: ThresholdSettings,
    evaluate: EvaluateSettings,
    category: str,
) -> InferenceConfig:
    """Derive the thresholds from normal training images that the training has not seen."""
    _, validation = training_split(manifest, fraction=data.calibration)
    device = resolve_device("auto")  # the one that will predict: its rounding, and the backends that it alone has
    thresholds = calibrate(
        average_flips(network.fuse(), evaluate.flips).to(device),
        [data_folder / name for name in validation],
        image_size=data.image_size,
        tiling=data.tiling,
        batch_size=evaluate.batch_size,
        device=device,
        smoothing=evaluate.smoothing,
        false_alarm_rate=threshold.false_alarm_rate,
    )
    return InferenceConfig(
        category=category,
        image_size=data.image_size,
        tiling=data.tiling,
        smoothing=evaluate.smoothing,
        flips=evaluate.flips,
        thresholds=thresholds,
    )


def pack_model(network: ALMRR, history: pd.DataFrame, inference: InferenceConfig) -> FillsFolder:
    """Put weights, architecture, history and thresholds into one folder that predicts by itself.

    Where the history says that the weights were chosen on the validation images, the thresholds lose their guarantee.
    """
    if METRIC in history:
        inference = inference.without_guarantee()

    def fill(folder: Path) -> None:
        network.save(folder)
        inference.save(folder)
        history.to_csv(folder / "history.csv", index=False)

    return fill


def forget_checkpoints(model: Path, category: str, scratch: Path) -> None:
    """Remove the checkpoints, once the finished model is in its place."""
    shutil.rmtree(_checkpoints(scratch, category), ignore_errors=True)


def _checkpoints(scratch: Path, category: str) -> Path:
    return scratch / "training" / category


def _log_live(step: int, values: Mapping[str, float]) -> None:
    if mlflow.active_run():
        mlflow.log_metrics(dict(values), step=step)
