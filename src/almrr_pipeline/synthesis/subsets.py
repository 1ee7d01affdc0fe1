"""A part of a synthetic set, for training or held out for selection, and its way to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from almrr_pipeline.common.progress import track
from almrr_pipeline.synthesis.simulate import (
    AnomalyRecipe,
    CropTask,
    ResizeTask,
    SampleTask,
    Stream,
    write_crops,
    write_resized,
    write_samples,
)
from almrr_pipeline.synthesis.workers import Spread

_SAMPLES_PER_TASK = 32
_IMAGES_PER_TASK = 16
_Task = TypeVar("_Task")


@dataclass(frozen=True)
class Part:
    """Samples made of some images with random numbers of their own."""

    prefix: str
    """Begins the names of the part's files."""
    images: tuple[Path, ...]
    normals: int
    """Normal images of the network's size: one for each image, or random crops."""
    samples: int
    samples_stream: Stream
    crops_stream: Stream

    def array_shapes(self, size: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], npt.DTypeLike]]:
        """Return shape and dtype of each of the part's arrays, by the name of its file without the suffix."""
        return {
            f"{self.prefix}normals": ((self.normals, *size, 3), np.uint8),
            f"{self.prefix}augmented": ((self.samples, *size, 3), np.uint8),
            f"{self.prefix}masks": ((self.samples, *size), np.uint8),
            f"{self.prefix}source": ((self.samples,), np.int64),
        }


def write_part(
    part: Part,
    folder: Path,
    *,
    textures: Path,
    image_size: tuple[int, int],
    tile_scale: float | None,
    recipe: AnomalyRecipe,
    spread: Spread,
) -> None:
    """Write a part's arrays: first the normal images, then the samples that are made of them.

    Args:
        part: what to write.
        folder: where to.
        textures: array of the textures.
        image_size: rows and columns.
        tile_scale: cut crops out of images that were scaled by this factor; None resizes whole images.
        recipe: of the anomalies.
        spread: does the tasks.
    """
    for name, (shape, dtype) in part.array_shapes(image_size).items():
        open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
    normals, augmented, masks, source = (folder / f"{name}.npy" for name in part.array_shapes(image_size))
    if tile_scale is None:
        resize_images(part.images, normals, spread=spread, description="read normal images")
    else:
        crops = [
            CropTask(
                image,
                normals,
                tuple(range(k, part.normals, len(part.images))),
                tile_scale,
                recipe.seed,
                part.crops_stream,
            )
            for k, image in enumerate(part.images)
        ]
        _follow(spread, write_crops, crops, total=part.normals, unit="crops", description="cut normal images")
    samples = [
        SampleTask(normals, textures, augmented, masks, source, recipe, part.samples_stream, start, stop)
        for start, stop in _cut(part.samples, _SAMPLES_PER_TASK)
    ]
    _follow(spread, write_samples, samples, total=part.samples, unit="samples", description="simulate anomalies")


def write_textures(images: Sequence[Path], target: Path, *, image_size: tuple[int, int], spread: Spread) -> None:
    """Write the textures as one array, uint8 (t, H, W, 3)."""
    open_memmap(target, mode="w+", dtype=np.uint8, shape=(len(images), *image_size, 3))
    resize_images(images, target, spread=spread, description="read textures")


def resize_images(images: Sequence[Path], target: Path, *, spread: Spread, description: str) -> None:
    """Fill an array with images, resized as a whole."""
    tasks = [
        ResizeTask(tuple(images[start:stop]), target, start)
        for start, stop in _cut(len(images), _IMAGES_PER_TASK)
    ]
    _follow(spread, write_resized, tasks, total=len(images), unit="images", description=description)


def _follow(
    spread: Spread, work: Callable[[_Task], int], tasks: Iterable[_Task], *, total: int, unit: str, description: str
) -> None:
    with track(total, unit=unit, description=description) as advance:
        for done in spread(work, tasks):
            advance(done)


def _cut(total: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(total, start + step)) for start in range(0, total, step)]
