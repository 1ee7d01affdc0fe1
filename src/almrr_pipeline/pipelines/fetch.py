"""The fetch pipeline: dataset -> images -> manifest; textures and backbone weights for all."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from almrr_pipeline.common.files import staging_folder
from almrr_pipeline.common.region import to_file
from almrr_pipeline.config import BackboneSettings, DataSettings
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.interest import decide_region, pass_outside
from almrr_pipeline.datasets.manifest import build_manifest
from almrr_pipeline.datasets.registry import dataset_for, fetch_category, fetch_textures
from almrr_pipeline.datasets.weights import fetch_backbone
from almrr_pipeline.pipelines.per_category import step


def download_textures(data: DataSettings, scratch: Path) -> Path:
    """Fetch the textures into a staging folder."""
    with staging_folder(scratch) as folder:
        fetch_textures(
            data.textures, target=folder, request=FetchRequest(scratch / "downloads", data)
        )
    return folder


def download_backbone(backbone: BackboneSettings, scratch: Path) -> Path:
    """Fetch the frozen backbone's weights into a staging folder."""
    with staging_folder(scratch) as folder:
        fetch_backbone(backbone, target=folder)
    return folder


def download_images(category: str, data: DataSettings, scratch: Path) -> Path:
    """Fetch a category's images into a staging folder."""
    with staging_folder(scratch) as folder:
        fetch_category(category, target=folder, request=FetchRequest(scratch / "downloads", data))
    return folder


def list_images(
    category: str, images: Path, data_folder: Path, data: DataSettings
) -> tuple[pd.DataFrame, bytes]:
    """Open every image once, and list them with their split, label and mask; decide the region."""
    dataset = dataset_for(category, data)
    manifest = build_manifest(
        dataset.items(category, images),
        root=data_folder,
        expected=dataset.expected(category),
        strict=data.strict,
        settings=data,
        name=category,
    )
    region = decide_region(list(zip(manifest["height"], manifest["width"], strict=True)), data)
    if region is not None:
        manifest = pass_outside(manifest, data_folder, region, data)
    return manifest, to_file(region)


SHARED_NODES = [
    step(download_textures, "params:data scratch_folder", "textures"),
    step(download_backbone, "params:backbone scratch_folder", "backbone_weights"),
]
NODES = [
    step(download_images, "params:category params:data scratch_folder", "images"),
    step(list_images, "params:category images data_folder params:data", "manifest region_file"),
]
