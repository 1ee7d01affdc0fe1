"""Images of one tile are recognized under any light; `mt_defect_tiles` is in test_fetch.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.datasets.same_tile import (
    SAME_TILE,
    compute_signatures,
    correlations,
    group_by_tile,
)


@pytest.fixture
def tiles(tmp_path: Path) -> list[Path]:
    """Three takes each of three surfaces: plain, lit from aside and brighter, shifted and noisy."""
    generator = np.random.default_rng(0)
    paths = []
    for number in range(3):
        surface = gaussian_filter(generator.normal(0.0, 60.0, (150, 130)), 1.5) + 100.0
        noise = generator.normal(0.0, 2.0, (146, 126))
        takes = (
            surface,
            1.5 * surface * np.linspace(0.5, 1.2, 130),
            0.6 * surface[2:-2, 2:-2] + 20.0 + noise,
        )
        for exposure, take in enumerate(takes):
            paths.append(tmp_path / f"{exposure}_{number}.png")
            Image.fromarray(np.clip(take, 0, 255).astype(np.uint8)).save(paths[-1])
    return paths


def test_takes_of_one_tile_are_grouped_under_the_first(tiles: list[Path]) -> None:
    assert group_by_tile(tiles) == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_the_order_changes_names_but_not_groups(tiles: list[Path]) -> None:
    mixed = [tiles[k] for k in (3, 0, 6, 4, 1, 7)]
    assert group_by_tile(mixed) == [0, 1, 2, 0, 1, 2]


def test_resemblance_is_a_correlation(tiles: list[Path]) -> None:
    likeness = correlations(compute_signatures(tiles))

    np.testing.assert_allclose(np.diag(likeness), 1.0, atol=1e-5)
    np.testing.assert_array_equal(likeness, likeness.T)
    same = np.kron(np.eye(3), np.ones((3, 3))).astype(bool)
    assert likeness[same].min() > SAME_TILE > 0.4 > likeness[~same].max()


def test_an_image_without_any_detail_is_like_no_other(tiles: list[Path], tmp_path: Path) -> None:
    blank = tmp_path / "blank.png"
    Image.new("L", (50, 40), 128).save(blank)

    assert group_by_tile([*tiles[:2], blank]) == [0, 0, 2]


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(AlmrrError, match=r"broken\.png"):
        group_by_tile([tmp_path / "broken.png"])
