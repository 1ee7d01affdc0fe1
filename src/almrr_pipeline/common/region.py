"""Region of interest: the part of a category's images that counts.

What is outside is blanked before a network sees it, and is 0 in the map, so that nothing outside
has any part in what is found inside.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import Annotated

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from almrr_pipeline.common.arrays import (
    AnomalyMap,
    ImageArray,
    MaskArray,
    allocate,
    release_pages,
)
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import resize_image
from almrr_pipeline.common.masks import read_mask

Polygon = Sequence[tuple[float, float]]
"""Corners (x, y), as fractions of width and height."""

BLANK = (124, 116, 104)
"""What is outside, in RGB: ImageNet's mean, which is 0 to a backbone, as its padding is."""
_DIMMED = 0.3  # of its brightness, where the outside is shown
_LARGEST_SIDE = 2048  # pixels of a stored region
_MOST_PIXELS = _LARGEST_SIDE**2
_LEAST = 0.001  # of an image; less is a mistake
_PROPORTIONS = 0.02  # by which those of an image and a region may differ
_BAND = 512  # rows that are worked on at a time


class Region(BaseModel):
    """Which pixels of an image count; stretched over images of any size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    png: Annotated[str, Field(max_length=700_000)]  # base64 of a PNG, white where an image counts

    @field_validator("png")
    @classmethod
    def _check_png(cls, png: str) -> str:
        try:
            with Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise ValueError("the region is larger than any")
                if not np.asarray(image.convert("1")).any():
                    raise ValueError("the region is empty")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"no PNG in base64 ({error})") from None
        return png

    @classmethod
    def of(cls, mask: MaskArray) -> Region:
        """The region where `mask`, shape (H, W), is True; reduced to a side of 2048 pixels."""
        longest = max(mask.shape)
        if longest > _LARGEST_SIDE:
            rows, columns = (max(1, side * _LARGEST_SIDE // longest) for side in mask.shape)
            mask = _sample(mask, (rows, columns), slice(0, rows))
        stream = io.BytesIO()
        Image.fromarray(mask).save(stream, "PNG", optimize=True)
        return cls(png=base64.b64encode(stream.getvalue()).decode("ascii"))

    @cached_property
    def mask(self) -> MaskArray:
        """True where an image counts, in the region's own size (H, W)."""
        with Image.open(io.BytesIO(base64.b64decode(self.png)), formats=["PNG"]) as image:
            return np.array(image.convert("1"), dtype=np.bool_)

    @property
    def fraction(self) -> float:
        """Of an image that counts."""
        return float(self.mask.mean())

    def at(self, size: tuple[int, int]) -> MaskArray:
        """True for the pixels of an image of `size`, (rows, columns), whose centers count."""
        return _sample(self.mask, size, slice(0, size[0]))

    def box(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of an image of `size` that hold all that counts."""
        places = (np.flatnonzero(self.mask.any(axis=axis)) for axis in (1, 0))
        sides = zip(places, self.mask.shape, size, strict=True)
        rows, columns = (
            slice(int(found[0]) * whole // own, -(-(int(found[-1]) + 1) * whole // own))
            for found, own, whole in sides
        )
        return rows, columns

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether an image of `size`, (rows, columns), has the region's proportions."""
        own = self.mask.shape
        return bool(abs(own[0] * size[1] / (own[1] * size[0]) - 1.0) <= _PROPORTIONS)

    def blank(self, image: ImageArray) -> ImageArray:
        """A copy of an image, uint8 RGB (H, W, 3), with the same color everywhere outside."""
        color = np.array(BLANK, dtype=np.uint8)
        return self._replace_outside(image, lambda rows: color)

    def dim(self, image: ImageArray) -> ImageArray:
        """A copy of an image, uint8 RGB (H, W, 3), dark outside, to be shown."""
        return self._replace_outside(image, lambda rows: (rows * _DIMMED).astype(np.uint8))

    def cut(self, anomaly_map: AnomalyMap) -> AnomalyMap:
        """The same map, shape (H, W), 0 outside from here on."""
        for rows, counted in self._bands(anomaly_map.shape):
            anomaly_map[rows][~counted] = 0.0
            release_pages(anomaly_map)
        return anomaly_map

    def _replace_outside(
        self, image: ImageArray, outside: Callable[[ImageArray], npt.NDArray[np.uint8]]
    ) -> ImageArray:
        changed: ImageArray = allocate(image.shape, np.uint8)
        for rows, counted in self._bands(image.shape):
            changed[rows] = np.where(counted[..., None], image[rows], outside(image[rows]))
            release_pages(changed)
            release_pages(image)
        return changed

    def _bands(self, shape: tuple[int, ...]) -> Iterator[tuple[slice, MaskArray]]:
        size = shape[0], shape[1]
        for top in range(0, size[0], _BAND):
            rows = slice(top, min(top + _BAND, size[0]))
            yield rows, _sample(self.mask, size, rows)


def _sample(mask: MaskArray, size: tuple[int, int], rows: slice) -> MaskArray:
    """Some rows of a mask stretched to `size`: each pixel is the one that its center is in."""
    places = [
        (2 * np.arange(start, stop) + 1) * own // (2 * whole)
        for start, stop, own, whole in (
            (rows.start, rows.stop, mask.shape[0], size[0]),
            (0, size[1], mask.shape[1], size[1]),
        )
    ]
    return mask[np.ix_(*places)]


def draw_region(stated: str | Sequence[Polygon], size: tuple[int, int]) -> Region:
    """The region that a setting states, for images of `size`, (rows, columns).

    Args:
        stated: path of an image, white where the images count, of their proportions; or polygons.
        size: of the images.

    Raises:
        AlmrrError: the file cannot be read, has other proportions, or next to nothing counts.
    """
    if isinstance(stated, str):
        try:
            mask = read_mask(Path(stated))
        except AlmrrError as error:
            raise AlmrrError(f"data.region: {error}") from None
    else:
        canvas = Image.new("1", _limit(size)[::-1])
        for polygon in stated:
            corners = [(x * canvas.width - 0.5, y * canvas.height - 0.5) for x, y in polygon]
            ImageDraw.Draw(canvas).polygon(corners, fill=1)
        mask = np.array(canvas, dtype=np.bool_)
    if mask.mean() < _LEAST:
        advice = "white is what counts" if isinstance(stated, str) else "corners are fractions"
        raise AlmrrError(f"data.region: next to nothing of the images would count; {advice}.")
    try:
        region = Region.of(mask)
    except ValidationError:
        raise AlmrrError("data.region: its outline is too ragged to be kept; smooth it.") from None
    if not region.fits(size):
        raise AlmrrError(
            f"data.region: {stated} is {mask.shape[1]} x {mask.shape[0]} pixels, and the images "
            f"are {size[1]} x {size[0]}; draw it over one of them."
        )
    return region


def _limit(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, _LARGEST_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resize_counted(image: ImageArray, size: tuple[int, int], region: Region | None) -> ImageArray:
    """Resize as `resize_image`; what is outside of the region is blank, and blends into nothing."""
    if region is None:
        return resize_image(image, size)
    return region.blank(resize_image(region.blank(image), size))


def show_counted(image: ImageArray, region: Region | None) -> ImageArray:
    """The image, dark where it does not count."""
    return image if region is None else region.dim(image)


def index_counted(
    values: AnomalyMap | MaskArray, region: Region | None
) -> MaskArray | EllipsisType:
    """Index of the pixels of a map or mask, shape (H, W), that count."""
    return ... if region is None else region.at((values.shape[0], values.shape[1]))


def find_counted(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which pixels of blanked images, uint8 (..., H, W, 3), count: all that are not blank."""
    return np.asarray((images != np.array(BLANK, dtype=np.uint8)).any(axis=-1))


def to_file(region: Region | None) -> bytes:
    """Content of a region's file, a PNG: without a region a single white pixel."""
    return base64.b64decode((region or Region.of(np.ones((1, 1), dtype=np.bool_))).png)


def from_file(content: bytes) -> Region | None:
    """The region of a file of `to_file`."""
    region = Region(png=base64.b64encode(content).decode("ascii"))
    return None if region.mask.shape == (1, 1) else region
