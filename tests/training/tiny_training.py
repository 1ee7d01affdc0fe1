"""A tiny ALMRR and a tiny synthetic set: a step takes a fraction of a second on one core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from almrr_pipeline.config import BackboneSettings, ModelSettings, TrainSettings
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone
from almrr_pipeline.synthesis.synthetic_set import SyntheticSet
from almrr_pipeline.training.checkpoints import Resuming
from almrr_pipeline.training.train import fit

SIDE = 128
SETTINGS: dict[str, Any] = {
    "steps": 9,
    "batch_size": 2,
    "learning_rate": 2e-3,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "schedule": "one_cycle",
    "accelerator": "cpu",
    "devices": 1,
    "checkpoint_every": 3,
    "log_every": 2,
    "selection": "validation",
}
"""Of the trainings that are interrupted."""

DEATHS: dict[str, dict[str, Any]] = {
    "killed between checkpoints": {"row": 8},
    "killed while writing a checkpoint": {"checkpoint": 2},
    "asked to end": {"row": 4, "by": "SIGTERM"},
}
"""How: see processes.py."""

TOGETHER = {"batch_size": 4, "checkpoint_every": 1, "steps": 2, "log_every": 1, "selection": "last"}
"""What differs in the training of two processes."""


def draw_samples(
    count: int, normals: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Augmented images, masks and the index of each one's normal image."""
    normal_index = np.arange(count) % len(normals)
    masks = np.zeros((count, *normals.shape[1:3]), dtype=bool)
    for k in range(0, count, 2):
        top, left = rng.integers(0, SIDE - 40, size=2)
        masks[k, top : top + 40, left : left + 30] = True
    augmented = np.where(masks[..., None], np.uint8(250), normals[normal_index])
    return augmented, masks, normal_index


def build_synthetic_set(samples: int = 10, normals: int = 3, validation: int = 2) -> SyntheticSet:
    rng = np.random.default_rng(5)
    images = rng.integers(60, 140, size=(normals + validation, SIDE, SIDE, 3), dtype=np.uint8)
    kept, validated = images[:normals], images[normals:]
    validation_samples = (validated, validated[..., 0] > 255, np.zeros(0, dtype=np.int64))
    if validation:
        validation_samples = draw_samples(2 * validation, validated, rng)
    return SyntheticSet(
        kept,
        *draw_samples(samples, kept, rng),
        validated,
        *validation_samples,
        description={},
    )


def build_model(**changes: Any) -> ALMRR:
    """The real network at tiny widths; its random weights are the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        backbone = build_backbone(BackboneSettings(name="lcnet_050"), weights=None)
        widths = {
            "latent": 16,
            "dim": 16,
            "depth": 2,
            "state": 4,
            "decoder": (8, 8),
            "refinement_width": 4,
            "memory_size": 8,
            "drop_path": 0.3,
        }
        settings = ModelSettings(**{**widths, **changes})
        return ALMRR(backbone, settings, image_size=(SIDE, SIDE), scan_backend="torch")


def train(
    model: ALMRR,
    synthetic_set: Any,
    *,
    scratch: Path,
    fingerprint: str = "resume",
    seed: int = 4,
    on_metrics: Callable[..., None] | None = None,
    keep_checkpoints: bool = False,
    **settings: Any,
) -> pd.DataFrame | None:
    """`fit` with the settings as keywords."""
    return fit(
        model,
        synthetic_set,
        TrainSettings(**settings),
        resuming=Resuming(scratch, fingerprint, keep=keep_checkpoints),
        seed=seed,
        on_metrics=on_metrics,
    )
