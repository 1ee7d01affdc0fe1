from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from almrr_pipeline.common.arrays import MaskArray
from almrr_pipeline.synthesis.masks import (
    BAND_FRACTION,
    LINE_LENGTH,
    WIDEST_LINE,
    band_mask,
    line_mask,
)

SHAPES = [(128, 128), (160, 256), (256, 192)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_line_is_one_thin_component(shape: tuple[int, int]) -> None:
    widest = int(WIDEST_LINE * min(shape))
    for seed in range(50):
        mask = line_mask(shape, generator=np.random.default_rng(seed))
        assert mask.shape == shape
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1
        # No disc much wider than the line fits into it; it is a little thicker where it bends.
        assert ndimage.distance_transform_cdt(np.pad(mask, 1)).max() <= widest / 2 + 1.5
        assert mask.sum() <= 2 * LINE_LENGTH[1] * min(shape) * (widest + 1)


def test_lines_have_all_directions_and_lengths() -> None:
    lengths, directions = [], []
    for seed in range(200):
        rows, columns = np.nonzero(line_mask((256, 256), generator=np.random.default_rng(seed)))
        lengths.append(np.hypot(np.ptp(rows), np.ptp(columns)))
        directions.append(np.ptp(rows) > np.ptp(columns))
    assert min(lengths) < 30
    assert max(lengths) > 120
    assert 0.35 < np.mean(directions) < 0.65


@pytest.mark.parametrize("shape", SHAPES)
def test_a_band_reaches_from_edge_to_edge_and_covers_its_fraction(shape: tuple[int, int]) -> None:
    low, high = BAND_FRACTION
    fractions = []
    for seed in range(50):
        mask = band_mask(shape, generator=np.random.default_rng(seed))
        border = np.ones(shape, dtype=bool)
        border[1:-1, 1:-1] = False
        fractions.append(mask.mean())
        assert mask.shape == shape
        for component in range(1, 1 + (labels := ndimage.label(mask)[0]).max()):
            assert (labels[border] == component).any()
    assert low - 0.01 <= min(fractions) < 0.15
    assert 0.35 < max(fractions) <= high + 0.01


def test_bands_have_one_edge_or_two() -> None:
    components = [
        ndimage.label(~band_mask((128, 128), generator=np.random.default_rng(seed)))[1]
        for seed in range(60)
    ]
    assert {1, 2} <= set(components)


@pytest.mark.parametrize("draw", [line_mask, band_mask])
def test_the_generator_alone_decides(draw: Callable[..., MaskArray]) -> None:
    first, second = (draw((128, 160), generator=np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
