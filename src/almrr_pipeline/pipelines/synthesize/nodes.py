"""Step of the synthesize pipeline."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from almrr_pipeline.config import DataSettings, SynthesisSettings
from almrr_pipeline.common.images import IMAGE_SUFFIXES
from almrr_pipeline.kedro_support.datasets import FillsFolder
from almrr_pipeline.datasets.manifest import training_split
from almrr_pipeline.synthesis.synthetic_set import synthesize


def simulate(
    manifest: pd.DataFrame,
    textures: Path,
    data_folder: Path,
    data: DataSettings,
    synthesis: SynthesisSettings,
    seed: int,
) -> FillsFolder:
    """Simulate anomalies on the normal training images; the images held out for the thresholds stay out."""
    training, validation = training_split(manifest, fraction=data.calibration)
    synthetic_set = synthesize(
        [data_folder / name for name in training],
        [data_folder / name for name in validation],
        sorted(path for path in textures.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES),
        root=data_folder,
        image_size=data.image_size,
        tiling=data.tiling,
        seed=seed,
        **synthesis.model_dump(),
    )
    return synthetic_set.save
