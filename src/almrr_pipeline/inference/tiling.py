"""Overlapping tiles of one size, and the map that is blended from the tiles' maps.

Every tile is inside the image, at even distances, so that an image of at least a tile's size needs
no padding. A smaller one is padded to a tile by reflection, half before and half after; the padding
is cut off the blended map again.

Along each axis a tile's weight rises over its overlap with the tile before and falls over that with
the next, as sin^2 and cos^2 (a raised cosine); toward the image's border it stays at 1. The weights
are divided by their sum, which makes them a partition of unity: agreeing tiles blend into exactly
what they agree on, and a tile's edge, where the network sees least around a pixel, has no weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from almrr_pipeline.common.arrays import AnomalyMap, Floats, ImageArray, allocate, release_pages


@dataclass(frozen=True)
class Axis:
    """Positions of the tiles along one axis, in pixels of the padded image."""

    length: int  # pixels of the image
    tile: int  # pixels of a tile
    overlap: float  # least fraction of a tile that the next one covers again, in [0, 1)

    @property
    def padding(self) -> tuple[int, int]:
        """Pixels to add before and after, so that one tile fits."""
        missing = max(0, self.tile - self.length)
        return missing // 2, missing - missing // 2

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First pixel of each tile; rising, from 0 to the last position where a tile fits."""
        slack = max(self.length, self.tile) - self.tile
        stride = max(1, self.tile - math.ceil(self.tile * self.overlap))
        steps = math.ceil(slack / stride)
        return tuple(k * slack // steps for k in range(steps + 1)) if steps else (0,)

    @cached_property
    def weights(self) -> Floats:
        """Weights of the tiles' pixels, in [0, 1], shape (tiles, tile); a pixel's sum to 1."""
        raw = np.ones((len(self.starts), self.tile))
        total = np.zeros(max(self.length, self.tile))
        for k, (start, following) in enumerate(pairwise(self.starts)):
            shared = self.tile - (following - start)  # pixels; their centers give sin^2 from 0 to 1
            rise = np.sin(np.pi / 2 * (np.arange(shared) + 0.5) / shared) ** 2
            raw[k, self.tile - shared :] *= rise[::-1]
            raw[k + 1, :shared] *= rise
        for start, weights in zip(self.starts, raw, strict=True):
            total[start : start + self.tile] += weights
        for start, weights in zip(self.starts, raw, strict=True):
            weights /= total[start : start + self.tile]
        return raw


@dataclass(frozen=True)
class TileGrid:
    """The tiles of an image of `size` pixels, row by row from the top left."""

    size: tuple[int, int]  # rows and columns of the image
    tile: tuple[int, int]  # rows and columns of a tile
    overlap: float = 0.25  # least fraction of a tile that the next one covers again, in [0, 1)

    def __post_init__(self) -> None:
        """Refuse impossible sizes and overlaps."""
        if min(self.size) < 1 or min(self.tile) < 1 or not 0.0 <= self.overlap < 1.0:
            raise ValueError(f"a grid needs positive sizes and an overlap in [0, 1); got {self}")

    @cached_property
    def axes(self) -> tuple[Axis, Axis]:
        """The rows' axis and the columns' axis."""
        rows = Axis(self.size[0], self.tile[0], self.overlap)
        return rows, Axis(self.size[1], self.tile[1], self.overlap)

    def __len__(self) -> int:
        rows, columns = self.axes
        return len(rows.starts) * len(columns.starts)

    def places(self) -> Iterator[tuple[tuple[slice, slice], Floats]]:
        """Position of each tile in the padded image, and its pixels' weights, shape `tile`."""
        rows, columns = self.axes
        for row, row_weights in zip(rows.starts, rows.weights, strict=True):
            for column, column_weights in zip(columns.starts, columns.weights, strict=True):
                place = slice(row, row + rows.tile), slice(column, column + columns.tile)
                yield place, np.outer(row_weights, column_weights)

    def cut(self, image: ImageArray) -> Iterator[ImageArray]:
        """Cut an image of this grid's size into tiles; uint8 (rows, columns, 3) each."""
        if image.shape[:2] != self.size:
            raise ValueError(f"the grid is for images of {self.size} pixels, not {image.shape[:2]}")
        rows, columns = self.axes
        padding = (rows.padding, columns.padding, (0, 0))
        padded = np.pad(image, padding, mode="reflect") if any(map(any, padding)) else image
        above = 0
        for place, _ in self.places():
            if place[0].start != above:
                above = place[0].start
                release_pages(image)
            yield padded[place]


class Blend:
    """The map of a whole image, summed from the maps of its tiles in the order of `TileGrid.cut`.

    It holds one map of the image's size and no tile. It sums in float64, so that rounding to
    float32 at the end makes agreement of the tiles exact, and nothing leaves [0, 1]. Only the rows
    of the tiles that still come are kept as sums.
    """

    def __init__(self, grid: TileGrid) -> None:
        self.grid = grid
        self._places = grid.places()
        self._missing = len(grid)
        rows, columns = (max(axis.length, axis.tile) for axis in grid.axes)
        self._map: AnomalyMap = allocate((rows, columns), np.float32)
        self._sum = np.zeros((grid.tile[0], columns), dtype=np.float64)
        self._top = 0  # row of the map that the sums begin with

    @property
    def complete(self) -> bool:
        """Whether the maps of all tiles have come."""
        return self._missing == 0

    def add(self, tile_map: AnomalyMap) -> None:
        """Blend in the next tile's map, float32, shape `tile` of the grid."""
        (rows, columns), weights = next(self._places)
        if done := rows.start - self._top:  # no further tile reaches these rows
            self._map[self._top : rows.start] = self._sum[:done]
            release_pages(self._map)
            kept = self._sum[done:].copy()
            self._sum[:] = 0.0
            self._sum[: len(kept)] = kept
            self._top = rows.start
        self._sum[:, columns] += weights * tile_map
        self._missing -= 1
        if not self._missing:
            self._map[self._top :] = self._sum

    def result(self) -> AnomalyMap:
        """The image's map, float32, shape `size` of the grid, padding cut off.

        Raises:
            ValueError: tiles are still missing.
        """
        if not self.complete:
            raise ValueError(f"{self._missing} of {len(self.grid)} tiles have not been blended yet")
        top, left = (axis.padding[0] for axis in self.grid.axes)
        rows, columns = self.grid.size
        return np.ascontiguousarray(self._map[top : top + rows, left : left + columns])
