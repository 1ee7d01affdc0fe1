"""Steps of the fetch pipeline."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from almrr_pipeline.config import BackboneSettings, DataSettings, split_seed
from almrr_pipeline.kedro_support.datasets import FillsFolder
from almrr_pipeline.datasets.manifest import build_manifest
from almrr_pipeline.datasets.registry import FetchRequest, fetch_category, fetch_textures, source_for
from almrr_pipeline.datasets.weights import fetch_backbone


def request_textures(data: DataSettings, scratch: Path) -> FillsFolder:
    """Fetch the textures into a folder."""
    request = fetch_request(data, scratch)
    return lambda folder: fetch_textures(data.textures, target=folder, request=request)


def request_backbone_weights(backbone: BackboneSettings) -> FillsFolder:
    """Fetch the frozen backbone's weights into a folder."""
    return lambda folder: fetch_backbone(
        name=backbone.name,
        weights=backbone.weights,
        sha256=backbone.sha256,
        stride_in_1x1=backbone.stride_in_1x1,
        feature_location=backbone.feature_location,
        target=folder,
    )


def request_images(category: str, data: DataSettings, scratch: Path) -> FillsFolder:
    """Fetch a category's images into a folder."""
    data_set, _ = split_seed(category)
    request = fetch_request(data, scratch)
    return lambda folder: fetch_category(data_set, target=folder, request=request)


def list_images(category: str, images: Path, data_folder: Path, data: DataSettings) -> pd.DataFrame:
    """Open every image once, and list them with their part in the protocol."""
    data_set, _ = split_seed(category)
    source = source_for(data_set)
    return build_manifest(
        source.items(data_set, images),
        root=data_folder,
        expected=source.expected(data_set),
        strict=data.strict,
    )


def fetch_request(data: DataSettings, scratch: Path) -> FetchRequest:
    """Where to look, from the parameters."""
    return FetchRequest(
        scratch=scratch / "downloads",
        mirror=data.mirror,
        local=data.source,
        addresses=data.addresses,
        sha256=data.sha256,
        accept_licenses=frozenset(data.accept_licenses),
        strict=data.strict,
    )
