"""Simulation of one sample: a normal image, with or without an anomaly (stage 1 of ALMRR)."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from almrr_pipeline.common.images import ImageArray, MaskArray
from almrr_pipeline.config import SynthesisSettings, Weights
from almrr_pipeline.synthesis.blend import blend_anomaly
from almrr_pipeline.synthesis.perlin import perlin_mask
from almrr_pipeline.synthesis.shapes import band_mask, line_mask
from almrr_pipeline.synthesis.textures import (
    alter_texture,
    change_exposure,
    has_color,
    remove_color,
)


class Stream(IntEnum):
    """Independent streams of random numbers, by what they are drawn for."""

    TRAINING = 0
    VALIDATION = 1
    TRAINING_CROPS = 2
    VALIDATION_CROPS = 3


class Sample(NamedTuple):
    """One sample of a synthetic set."""

    augmented: ImageArray
    """uint8 in [0, 255], shape (H, W, 3)."""
    mask: MaskArray
    """bool, shape (H, W); all False for a sample without an anomaly."""
    normal_index: int
    """Row of the normal image that was augmented."""


def make_generator(seed: int, number: int, stream: Stream) -> np.random.Generator:
    """Return the random generator of sample or crop `number`: it depends on these three alone."""
    return np.random.default_rng(np.random.SeedSequence([seed, number], spawn_key=(stream,)))


def simulate_sample(
    number: int,
    *,
    normals: npt.NDArray[np.uint8],
    textures: npt.NDArray[np.uint8],
    settings: SynthesisSettings,
    seed: int,
    stream: Stream = Stream.TRAINING,
) -> Sample:
    """Simulate one sample of the synthetic set.

    The order of the draws is part of what a seed stands for.

    Args:
        number: of the sample; with seed and stream it determines all random numbers.
        normals: normal images, uint8 in [0, 255], shape (n, H, W, 3).
        textures: anomaly textures, uint8 in [0, 255], shape (t, H, W, 3).
        settings: what is drawn from which range.
        seed: 0 or more.
        stream: training or validation.
    """
    generator = make_generator(seed, number, stream)
    normal_index = int(generator.integers(len(normals)))
    normal = np.asarray(normals[normal_index])
    if generator.random() < settings.anomaly_free:
        return Sample(normal, np.zeros(normal.shape[:2], dtype=np.bool_), normal_index)
    is_texture = _draw_choice(settings.materials, generator) == "texture"
    texture = np.asarray(textures[generator.integers(len(textures))]) if is_texture else None
    mask = _draw_mask(normal.shape[:2], settings, generator)
    if texture is None:
        anomaly = change_exposure(normal, generator=generator)
    else:
        anomaly = alter_texture(texture, count=settings.operations, generator=generator)
        if settings.color == "match" and not has_color(normal):
            anomaly = remove_color(anomaly)
    opacity = generator.uniform(*settings.opacity)
    return Sample(blend_anomaly(normal, anomaly, mask, opacity=opacity), mask, normal_index)


def _draw_mask(
    shape: tuple[int, int], settings: SynthesisSettings, generator: np.random.Generator
) -> MaskArray:
    match _draw_choice(settings.shapes, generator):
        case "line":
            return line_mask(shape, generator=generator)
        case "band":
            return band_mask(shape, generator=generator)
        case _:
            return perlin_mask(
                shape,
                grid_exponents=settings.grid_exponents,
                threshold=settings.threshold,
                generator=generator,
            )


def _draw_choice(weights: Weights, generator: np.random.Generator) -> str:
    """Draw one of several names by weight; where only one has a weight, no number is drawn."""
    possible = [(name, weight) for name, weight in weights if weight > 0]
    if len(possible) == 1:
        return possible[0][0]
    values = np.array([weight for _, weight in possible])
    return possible[generator.choice(len(possible), p=values / values.sum())][0]
