from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.inference.tiling import AnomalyMap, Axis, Blend, TileGrid

LENGTHS = st.integers(1, 120)
TILES = st.integers(1, 40)
OVERLAPS = st.floats(0.0, 0.75)
GRIDS = st.builds(
    TileGrid, st.tuples(LENGTHS, LENGTHS), tile=st.tuples(TILES, TILES), overlap=OVERLAPS
)


def _noise(grid: TileGrid) -> ImageArray:
    return np.random.default_rng(0).integers(0, 256, size=(*grid.size, 3), dtype=np.uint8)


def _blend(
    grid: TileGrid, image: ImageArray, model: Callable[[ImageArray], AnomalyMap]
) -> AnomalyMap:
    blend = Blend(grid)
    for tile in grid.cut(image):
        blend.add(model(tile))
    return blend.result()


@settings(deadline=None)
@given(LENGTHS, TILES, OVERLAPS)
def test_tiles_cover_the_image_and_stay_inside(length: int, tile: int, overlap: float) -> None:
    starts = Axis(length, tile, overlap).starts
    assert starts[0] == 0
    assert starts[-1] == max(length, tile) - tile
    assert list(starts) == sorted(set(starts))
    assert all(after - before <= tile for before, after in pairwise(starts))


@settings(deadline=None)
@given(LENGTHS, TILES, OVERLAPS)
def test_neighbors_share_at_least_the_overlap(length: int, tile: int, overlap: float) -> None:
    starts = Axis(length, tile, overlap).starts
    least = min(np.ceil(tile * overlap), tile - 1)
    assert all(before + tile - after >= least for before, after in pairwise(starts))


@settings(deadline=None)
@given(LENGTHS, TILES, OVERLAPS)
def test_no_tile_could_be_left_out(length: int, tile: int, overlap: float) -> None:
    starts = Axis(length, tile, overlap).starts
    stride = max(1, tile - int(np.ceil(tile * overlap)))
    assert len(starts) == 1 or (len(starts) - 2) * stride < length - tile


def test_known_grid() -> None:
    # 100 pixels, tiles of 40, a quarter shared: strides of at most 30, so three tiles, 30 apart.
    assert Axis(100, 40, 0.25).starts == (0, 30, 60)
    assert Axis(101, 40, 0.25).starts == (0, 20, 40, 61)
    assert Axis(40, 40, 0.25).starts == (0,)
    assert Axis(39, 40, 0.25).padding == (0, 1)


@settings(deadline=None)
@given(LENGTHS, TILES, OVERLAPS)
def test_weights_sum_to_one_at_every_pixel(length: int, tile: int, overlap: float) -> None:
    axis = Axis(length, tile, overlap)
    total = np.zeros(max(length, tile))
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        assert weights.min() >= 0
        total[start : start + tile] += weights
    np.testing.assert_allclose(total, 1.0, rtol=0, atol=1e-15)


@settings(deadline=None)
@given(GRIDS)
def test_what_goes_in_comes_out(grid: TileGrid) -> None:
    image = _noise(grid)
    blended = _blend(grid, image, lambda tile: tile[..., 0].astype(np.float32) / 255)
    assert blended.shape == grid.size
    np.testing.assert_array_equal(blended, image[..., 0].astype(np.float32) / 255)


@settings(deadline=None)
@given(GRIDS, st.floats(0.0, 1.0, width=32))
def test_a_constant_stays_constant(grid: TileGrid, value: float) -> None:
    blended = _blend(
        grid, _noise(grid), lambda tile: np.full(tile.shape[:2], value, dtype=np.float32)
    )
    np.testing.assert_array_equal(blended, np.float32(value))


@settings(deadline=None)
@given(st.integers(33, 200), st.floats(0.1, 0.5))
def test_disagreeing_tiles_leave_no_seam(length: int, overlap: float) -> None:
    """A raised cosine over n pixels rises by at most pi / 2n a pixel; a hard edge by 1."""
    axis = Axis(length, 32, overlap)
    blended = np.zeros(length)
    for k, (start, weights) in enumerate(zip(axis.starts, axis.weights, strict=True)):
        blended[start : start + 32] += weights * (k % 2)
    shared = np.ceil(32 * overlap)
    assert np.abs(np.diff(blended)).max() <= np.pi / 2 / shared + 1e-6


def test_a_tiles_inner_edge_counts_for_nothing_and_its_outer_edge_fully() -> None:
    first, second = Axis(48, 32, 0.5).weights
    assert first[0] == 1.0
    assert second[-1] == 1.0
    assert first[-1] < 0.01
    assert second[0] < 0.01


@settings(deadline=None)
@given(GRIDS)
def test_tiles_have_one_size(grid: TileGrid) -> None:
    tiles = list(grid.cut(_noise(grid)))
    assert len(tiles) == len(grid)
    assert {tile.shape for tile in tiles} == {(*grid.tile, 3)}


def test_tiles_of_a_large_image_hold_its_own_pixels_alone() -> None:
    grid = TileGrid((50, 70), tile=(32, 32))
    image = np.arange(50 * 70, dtype=np.uint16).reshape(50, 70, 1)
    seen = np.concatenate([tile.ravel() for tile in grid.cut(image)])  # type: ignore[arg-type]
    assert set(seen) == set(image.ravel())
    assert all(np.shares_memory(tile, image) for tile in grid.cut(image))  # type: ignore[arg-type]


def test_a_small_image_is_padded_by_reflection() -> None:
    image = np.array([[[10], [20], [30]]], dtype=np.uint8).repeat(3, axis=2)
    (tile,) = TileGrid((1, 3), tile=(2, 7)).cut(image)
    assert tile[..., 0].tolist() == [[30, 20, 10, 20, 30, 20, 10]] * 2


def test_the_blend_holds_back_until_the_last_tile() -> None:
    blend = Blend(TileGrid((40, 64), tile=(32, 32)))
    blend.add(np.zeros((32, 32), dtype=np.float32))
    assert not blend.complete
    with pytest.raises(ValueError, match="5 of 6 tiles"):
        blend.result()


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(40, 64\)"):
        list(TileGrid((40, 64), tile=(32, 32)).cut(np.zeros((64, 40, 3), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [((0, 5), (2, 2), 0.0), ((5, 5), (0, 2), 0.0), ((5, 5), (2, 2), 1.0)],
)
def test_impossible_grids_are_refused(
    size: tuple[int, int], tile: tuple[int, int], overlap: float
) -> None:
    with pytest.raises(ValueError, match="positive sizes"):
        TileGrid(size, tile=tile, overlap=overlap)


@settings(deadline=None)
@given(GRIDS)
def test_rows_that_are_done_leave_the_sums_as_they_would_be_at_the_end(grid: TileGrid) -> None:
    maps = np.random.default_rng(1).random((len(grid), *grid.tile), dtype=np.float32)
    blend = Blend(grid)
    total = np.zeros([max(axis.length, axis.tile) for axis in grid.axes])
    for (place, weights), tile_map in zip(grid.places(), maps, strict=True):
        blend.add(tile_map)
        total[place] += weights * tile_map
    top, left = (axis.padding[0] for axis in grid.axes)
    whole = total[top : top + grid.size[0], left : left + grid.size[1]].astype(np.float32)
    np.testing.assert_array_equal(blend.result(), whole)
