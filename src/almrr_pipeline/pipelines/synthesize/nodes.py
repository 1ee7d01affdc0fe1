"""Step of the synthesize pipeline."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from almrr_pipeline.config import DataSettings, SynthesisSettings
from almrr_pipeline.images import IMAGE_SUFFIXES
from almrr_pipeline.pipelines.datasets import FillsFolder
from almrr_pipeline.sources.manifest import training_split
from almrr_pipeline.synthesis.pool import simulate_pool


def simulate(
    manifest: pd.DataFrame,
    textures: Path,
    data_folder: Path,
    data: DataSettings,
    synthesis: SynthesisSettings,
    seed: int,
) -> FillsFolder:
    """Simulate anomalies on the normal training pictures; the pictures held out for the thresholds stay out."""
    training, held_out = training_split(manifest, fraction=data.calibration)
    pool = simulate_pool(
        [data_folder / name for name in training],
        [data_folder / name for name in held_out],
        sorted(path for path in textures.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES),
        root=data_folder,
        image_size=data.image_size,
        tiling=data.tiling,
        seed=seed,
        **synthesis.model_dump(),
    )
    return pool.save
