"""Outlines of simulated anomalies besides the paper's Perlin noise: lines and bands.

Perlin noise above a threshold makes blobs. Cracks and scratches are lines of a pixel or a few, and
a surface that was ground, coated or lit unevenly differs from one edge of the image to the other; a
network trained on blobs alone misses both.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from almrr_pipeline.common.arrays import MaskArray

# Lengths are fractions of the image's shorter side.
LINE_LENGTH = (0.08, 0.6)
WIDEST_LINE = 1 / 64  # the thinnest line is a pixel wide
LINE_BEND = 0.25  # largest distance of a line's middle from its chord, as a fraction of its length
BAND_FRACTION = (0.05, 0.45)  # of the image's area: below half, so that the band is what is unusual
BAND_WAVE = 0.04  # largest amplitude of a band's edge
_CURVE_POINTS = 48  # corners of a line's polygon, which keeps within 0.0001 sides of the curve


def line_mask(shape: tuple[int, int], *, generator: np.random.Generator) -> MaskArray:
    """Draw a thin line, a quadratic Bezier curve, into a mask of `shape` pixels (rows, columns).

    Place, direction, length, bend and width are random. The mask is True somewhere, as the line's
    middle is inside the image.
    """
    side = min(shape)
    length = generator.uniform(*LINE_LENGTH) * side
    angle = generator.uniform(0.0, np.pi)
    forward = np.array([np.cos(angle), np.sin(angle)])
    aside = np.array([-np.sin(angle), np.cos(angle)])
    bend = generator.uniform(-LINE_BEND, LINE_BEND) * length
    t = np.linspace(-1.0, 1.0, _CURVE_POINTS)[:, None]
    middle = generator.uniform(0.0, 1.0, 2) * (shape[1] - 1, shape[0] - 1)  # x, y
    points = middle + 0.5 * length * t * forward - bend * t**2 * aside
    width = int(generator.integers(1, max(1, int(WIDEST_LINE * side)), endpoint=True))
    canvas = Image.new("1", (shape[1], shape[0]))
    corners = [(float(x), float(y)) for x, y in points]
    ImageDraw.Draw(canvas).line(corners, fill=1, width=width, joint="curve")
    return np.array(canvas, dtype=np.bool_)


def band_mask(shape: tuple[int, int], *, generator: np.random.Generator) -> MaskArray:
    """Draw one side of a wavy line, or the area between two, into a mask of `shape` pixels.

    Direction, area, wave, and whether there are one or two lines are random. The fraction of True
    pixels is in `BAND_FRACTION`.
    """
    side = min(shape)
    angle = generator.uniform(0.0, 2.0 * np.pi)
    rows, columns = np.indices(shape)
    across = np.cos(angle) * columns + np.sin(angle) * rows
    along = -np.sin(angle) * columns + np.cos(angle) * rows
    wavelength, phase = generator.uniform(0.5, 2.0) * side, generator.uniform(0.0, 2.0 * np.pi)
    amplitude = generator.uniform(0.0, BAND_WAVE) * side
    position = across + amplitude * np.sin(2.0 * np.pi * along / wavelength + phase)
    fraction = generator.uniform(*BAND_FRACTION)
    if generator.random() < 0.5:
        center = np.quantile(position, generator.uniform(0.5 * fraction, 1.0 - 0.5 * fraction))
        position = -np.abs(position - center)
    mask: MaskArray = position > np.quantile(position, 1.0 - fraction)
    return mask
