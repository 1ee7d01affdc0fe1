"""The work of making a synthetic set, cut into tasks that write a stretch of an array on disk each.

A task is a function of its arguments and of files: any process may do it, and what comes out is the same. Every sample
and every crop has a random generator of its own, made of the seed, its number and its stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from almrr_pipeline.common.images import ImageArray, read_image, resize_image
from almrr_pipeline.synthesis.blend import blend_anomaly
from almrr_pipeline.synthesis.perlin import BinaryMask, perlin_mask
from almrr_pipeline.synthesis.shapes import band_mask, line_mask
from almrr_pipeline.synthesis.textures import alter_texture, change_exposure, has_color, remove_color

Material = Literal["texture", "exposure"]
"""What fills an anomaly: an altered texture (the paper), or the image itself as if exposed otherwise."""
Shape = Literal["perlin", "line", "band"]
"""Outline of an anomaly: Perlin noise above a threshold (the paper), a thin line, a band across the image."""
_Kind = TypeVar("_Kind", bound=str)


class Stream(IntEnum):
    """What random numbers are drawn for; streams are independent of each other."""

    TRAINING = 0
    VALIDATION = 1
    TRAINING_CROPS = 2
    VALIDATION_CROPS = 3


@dataclass(frozen=True)
class AnomalyRecipe:
    """How anomalies are simulated; see `synthesize` for ranges."""

    anomaly_free: float
    grid_exponents: tuple[int, int]
    threshold: float
    opacity: tuple[float, float]
    operations: int
    seed: int
    match_color: bool = False
    """On a normal image without color the texture loses its own."""
    materials: Mapping[Material, float] = field(default_factory=lambda: {"texture": 1.0})
    """How often an anomaly is made of what; relative to each other."""
    shapes: Mapping[Shape, float] = field(default_factory=lambda: {"perlin": 1.0})
    """How often it has which outline."""


@dataclass(frozen=True)
class SampleTask:
    """Samples `start` to `stop` (not included) of one part of the synthetic set."""

    normals: Path
    textures: Path
    augmented: Path
    masks: Path
    source: Path
    recipe: AnomalyRecipe
    stream: Stream
    start: int
    stop: int


@dataclass(frozen=True)
class ResizeTask:
    """Images to be resized to the rows `start`, `start` + 1, ... of an array."""

    images: tuple[Path, ...]
    target: Path
    start: int


@dataclass(frozen=True)
class CropTask:
    """Random crops of one image, for the rows `rows` of an array."""

    image: Path
    target: Path
    rows: tuple[int, ...]
    scale: float
    seed: int
    stream: Stream


def make_generator(seed: int, number: int, stream: Stream) -> np.random.Generator:
    """Return the random generator of sample or crop `number`: it depends on these three alone."""
    return np.random.default_rng(np.random.SeedSequence([seed, number], spawn_key=(stream,)))


def simulate_sample(
    number: int,
    *,
    normals: npt.NDArray[np.uint8],
    textures: npt.NDArray[np.uint8],
    recipe: AnomalyRecipe,
    stream: Stream = Stream.TRAINING,
) -> tuple[ImageArray, BinaryMask, int]:
    """Simulate one sample of the synthetic set.

    Args:
        number: which sample; with the recipe's seed and the stream it determines all that is drawn.
        normals: uint8 in [0, 255], shape (n, H, W, 3).
        textures: textures of the same kind, shape (t, H, W, 3).
        recipe: what is drawn from which range.
        stream: training or held-out.

    Returns:
        The augmented image, uint8 (H, W, 3); its mask, bool (H, W), all False for a sample without anomaly; and
        which normal image it was made of.
    """
    generator = make_generator(recipe.seed, number, stream)
    source = int(generator.integers(len(normals)))
    normal = np.asarray(normals[source])
    if generator.random() < recipe.anomaly_free:
        return normal, np.zeros(normal.shape[:2], dtype=np.bool_), source
    is_texture = _draw_kind(recipe.materials, generator) == "texture"
    texture = np.asarray(textures[generator.integers(len(textures))]) if is_texture else None
    mask = _draw_mask(normal.shape[:2], recipe, generator)
    if texture is None:
        anomaly = change_exposure(normal, generator=generator)
    else:
        anomaly = alter_texture(texture, count=recipe.operations, generator=generator)
        if recipe.match_color and not has_color(normal):
            anomaly = remove_color(anomaly)
    opacity = generator.uniform(*recipe.opacity)
    return blend_anomaly(normal, anomaly, mask, opacity=opacity), mask, source


def _draw_mask(shape: tuple[int, int], recipe: AnomalyRecipe, generator: np.random.Generator) -> BinaryMask:
    match _draw_kind(recipe.shapes, generator):
        case "line":
            return line_mask(shape, generator=generator)
        case "band":
            return band_mask(shape, generator=generator)
        case _:
            return perlin_mask(
                shape, grid_exponents=recipe.grid_exponents, threshold=recipe.threshold, generator=generator
            )


def _draw_kind(shares: Mapping[_Kind, float], generator: np.random.Generator) -> _Kind:
    """Draw one of several kinds by their shares; a single one needs no random number."""
    kinds = [kind for kind, share in shares.items() if share > 0]
    if len(kinds) == 1:
        return kinds[0]
    weights = np.array([shares[kind] for kind in kinds])
    return kinds[generator.choice(len(kinds), p=weights / weights.sum())]


def write_samples(task: SampleTask) -> int:
    """Simulate a stretch of samples and write them; returns how many."""
    normals, textures = open_memmap(task.normals, mode="r"), open_memmap(task.textures, mode="r")
    augmented, masks, sources = (open_memmap(path, mode="r+") for path in (task.augmented, task.masks, task.source))
    for row in range(task.start, task.stop):
        augmented[row], masks[row], sources[row] = simulate_sample(
            row, normals=normals, textures=textures, recipe=task.recipe, stream=task.stream
        )
    return task.stop - task.start


def write_resized(task: ResizeTask) -> int:
    """Read images and write them at the array's size; returns how many."""
    target = open_memmap(task.target, mode="r+")
    for row, image in enumerate(task.images, start=task.start):
        target[row] = resize_image(read_image(image), target.shape[1:3])
    return len(task.images)


def write_crops(task: CropTask) -> int:
    """Read an image, scale it and write random crops of the array's size; returns how many."""
    target = open_memmap(task.target, mode="r+")
    size = (int(target.shape[1]), int(target.shape[2]))
    image = scale_image(read_image(task.image), scale=task.scale, at_least=size)
    for row in task.rows:
        generator = make_generator(task.seed, row, task.stream)
        top, left = (int(generator.integers(image.shape[axis] - size[axis] + 1)) for axis in (0, 1))
        target[row] = image[top : top + size[0], left : left + size[1]]
    return len(task.rows)


def scale_image(image: ImageArray, *, scale: float, at_least: tuple[int, int]) -> ImageArray:
    """Scale an image; where it is then smaller than a crop, add its reflection around it, as prediction does.

    Args:
        image: uint8 in [0, 255], shape (H, W, 3).
        scale: factor of both sides.
        at_least: rows and columns of a crop.

    Returns:
        uint8 in [0, 255], at least of that size.
    """
    rows, columns = (max(1, round(length * scale)) for length in image.shape[:2])
    scaled = resize_image(image, (rows, columns))
    missing = (max(0, at_least[0] - rows), max(0, at_least[1] - columns))
    if not any(missing):
        return scaled
    padding = [(pixels // 2, pixels - pixels // 2) for pixels in missing]
    return np.pad(scaled, [*padding, (0, 0)], mode="reflect")
