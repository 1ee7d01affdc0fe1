"""Simulation of one sample: a normal image, with or without an anomaly (stage 1 of ALMRR)."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from almrr_pipeline.common.arrays import ImageArray, MaskArray
from almrr_pipeline.common.region import find_counted
from almrr_pipeline.config import SynthesisSettings, Weights
from almrr_pipeline.synthesis import textures as operations
from almrr_pipeline.synthesis.masks import MOST_DRAWS, band_mask, line_mask, perlin_mask


class Stream(IntEnum):
    """Independent streams of random numbers, by what they are drawn for."""

    TRAINING = 0
    VALIDATION = 1
    TRAINING_CROPS = 2
    VALIDATION_CROPS = 3


class Sample(NamedTuple):
    """One sample of a synthetic set."""

    augmented: ImageArray
    mask: MaskArray  # all False without an anomaly
    normal_index: int  # of the normal image that was augmented


def make_generator(seed: int, number: int, stream: Stream) -> np.random.Generator:
    """Return the random generator of sample or crop `number`: it depends on these three alone."""
    return np.random.default_rng(np.random.SeedSequence([seed, number], spawn_key=(stream,)))


def simulate_sample(
    number: int,
    *,
    normals: ImageArray,
    textures: ImageArray,
    settings: SynthesisSettings,
    seed: int,
    stream: Stream = Stream.TRAINING,
    has_region: bool = False,
) -> Sample:
    """Simulate one sample; the order of the draws is part of what a seed stands for.

    Args:
        number: of the sample; with `seed` and `stream` it determines all random numbers.
        normals: normal images, uint8 in [0, 255], shape (n, H, W, 3).
        textures: anomaly textures, uint8 in [0, 255], shape (t, H, W, 3).
        settings: ranges and weights of what is drawn.
        seed: 0 or more.
        stream: of the training or the validation samples.
        has_region: whether anomalies are only where the normal image is not blank.
    """
    generator = make_generator(seed, number, stream)
    normal_index = int(generator.integers(len(normals)))
    normal = np.asarray(normals[normal_index])
    if generator.random() < settings.anomaly_free:
        return Sample(normal, np.zeros(normal.shape[:2], dtype=np.bool_), normal_index)
    is_texture = _draw_choice(settings.materials, generator) == "texture"
    texture = np.asarray(textures[generator.integers(len(textures))]) if is_texture else None
    mask = _draw_mask(normal.shape[:2], settings, generator)
    if has_region:
        counted = find_counted(normal)
        for _ in range(MOST_DRAWS):
            if (mask & counted).any():
                break
            mask = _draw_mask(normal.shape[:2], settings, generator)
        mask = mask & counted
    if texture is None:
        anomaly = operations.change_exposure(normal, generator=generator)
    else:
        anomaly = operations.alter_texture(texture, count=settings.operations, generator=generator)
        if settings.color == "match" and not operations.has_color(normal):
            anomaly = operations.remove_color(anomaly)
    opacity = generator.uniform(*settings.opacity)
    return Sample(blend_anomaly(normal, anomaly, mask, opacity=opacity), mask, normal_index)


def blend_anomaly(
    normal: ImageArray, anomaly: ImageArray, mask: MaskArray, *, opacity: float
) -> ImageArray:
    """Blend an anomaly into a normal image: I_a = (1 - M) I + (1 - b) M A + b M I (ALMRR, stage 1).

    Images, uint8 in [0, 255], shape (H, W, 3), are blended by their values and rounded to the
    nearest; the ImageNet normalization belongs to the backbone and comes later. M is `mask`, bool,
    shape (H, W); b is `opacity`, in [0, 1], the fraction of the normal image that shines through.
    """
    b = np.float32(opacity)
    augmented = normal.copy()  # outside of the mask the formula leaves I as it is
    augmented[mask] = np.rint((1 - b) * anomaly[mask] + b * normal[mask])  # (pixels, 3), float32
    return augmented


def _draw_mask(
    shape: tuple[int, int], settings: SynthesisSettings, generator: np.random.Generator
) -> MaskArray:
    match _draw_choice(settings.shapes, generator):
        case "line":
            return line_mask(shape, generator=generator)
        case "band":
            return band_mask(shape, generator=generator)
    exponents, threshold = settings.grid_exponents, settings.threshold
    return perlin_mask(shape, grid_exponents=exponents, threshold=threshold, generator=generator)


def _draw_choice(weights: Weights, generator: np.random.Generator) -> str:
    """Draw one of several names by weight; where only one has a weight, no number is drawn."""
    names = [name for name, weight in weights if weight > 0]
    if len(names) == 1:
        return names[0]
    values = np.array([getattr(weights, name) for name in names])
    return names[generator.choice(len(names), p=values / values.sum())]
