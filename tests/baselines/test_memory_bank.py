"""The memory bank: its parts, against a slow search, and on drawn images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from almrr_pipeline.baselines.memory_bank import (
    BankSettings,
    MemoryBank,
    build_memory_bank,
    embed,
)
from almrr_pipeline.config import BackboneSettings, Tiling
from almrr_pipeline.model.backbone import Backbone, build_backbone


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build_backbone(BackboneSettings(name="resnet10t"), weights=None)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three striped images, and one with a bright square."""
    generator = np.random.default_rng(0)
    paths = []
    for index in range(4):
        stripes = np.indices((96, 96))[1] // 4 % 2 * 60
        image = (stripes + generator.integers(60, 90, (96, 96))).astype(np.uint8)
        if index == 3:
            image[30:60, 20:60] = 255
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(image).save(paths[-1])
    return paths


def test_distances_are_those_of_a_nearest_neighbor_search(backbone: Backbone) -> None:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    cells = embed(backbone, images).permute(0, 2, 3, 1)  # (B, h, w, C)
    core = cells[0].flatten(0, 1)[:5]
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(core)
    found = torch.from_numpy(search.kneighbors(cells[1].flatten(0, 1))[0]).view(1, 1, 8, 12)
    maps = MemoryBank(backbone, core)(images)
    assert maps.shape == (2, 64, 96)
    mean = found.mean().item()  # enlarging and smoothing keep it, up to what the borders weigh
    assert maps[1].mean().item() == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(enabled=True)])
def test_a_drawn_defect_is_the_farthest_from_memory(
    backbone: Backbone, images: list[Path], tiling: Tiling
) -> None:
    bank = build_memory_bank(
        backbone, images[:3], (64, 64), tiling, settings=BankSettings(100, 60), device="cpu"
    )
    normal, defective = (scaled.anomaly_map for scaled in bank.maps(images[2:]))
    assert defective.shape == ((96, 96) if tiling.enabled else (64, 64))
    rows, columns = np.unravel_index(defective.argmax(), defective.shape)
    scale = 96 / len(defective)
    assert 24 <= rows * scale <= 66
    assert 14 <= columns * scale <= 66
    assert normal.max() < defective.max()
    assert len(bank.model.core) == 60


def test_the_same_seed_remembers_the_same(backbone: Backbone, images: list[Path]) -> None:
    first, again = (
        build_memory_bank(
            backbone, images, (64, 64), Tiling(), settings=BankSettings(50, 20), device="cpu"
        )
        for _ in range(2)
    )
    assert torch.equal(first.model.core, again.model.core)
