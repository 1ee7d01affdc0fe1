"""The synthesize pipeline: normal training images + textures -> synthetic set (stage 1)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from almrr_pipeline.common.files import staging_folder
from almrr_pipeline.common.images import IMAGE_SUFFIXES
from almrr_pipeline.common.region import from_file
from almrr_pipeline.config import DataSettings, SynthesisSettings
from almrr_pipeline.datasets.manifest import image_reading, training_split
from almrr_pipeline.pipelines.per_category import step
from almrr_pipeline.synthesis.synthetic_set import synthesize
from almrr_pipeline.synthesis.writer import ImagePaths


def simulate_anomalies(
    manifest: pd.DataFrame,
    region_file: bytes,
    textures: Path,
    data_folder: Path,
    data: DataSettings,
    synthesis: SynthesisSettings,
    seed: int,
    scratch: Path,
) -> Path:
    """Simulate anomalies on the normal training images, and apart on the validation images."""
    training, validation = training_split(manifest, fraction=data.validation_fraction)
    texture_paths = [path for path in textures.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    images = ImagePaths(
        root=data_folder,
        training=[data_folder / name for name in training],
        validation=[data_folder / name for name in validation],
        textures=sorted(texture_paths),
        reading=image_reading(manifest, data),
        region=from_file(region_file),
    )
    with staging_folder(scratch) as folder:
        synthesize(
            images,
            synthesis,
            folder=folder,
            image_size=data.image_size,
            tiling=data.tiling,
            seed=seed,
        )
    return folder


NODES = [
    step(
        simulate_anomalies,
        "manifest region_file textures data_folder params:data params:synthesis params:seed "
        "scratch_folder",
        "synthetic_set",
    )
]
