"""Outlines of simulated anomalies besides the paper's Perlin noise: thin lines, and bands from edge to edge.

Perlin noise above a threshold makes blobs. Cracks and scratches are lines of a pixel or a few, and a surface that was
ground, coated or lit unevenly differs from one edge of the image to the other; a network that has seen blobs alone
misses both.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from almrr_pipeline.synthesis.perlin import BinaryMask

LINE_LENGTH = (0.08, 0.6)
"""Of a line, as a share of the image's shorter side."""
WIDEST_LINE = 1 / 64
"""As a share of the image's shorter side; the thinnest line is a pixel wide."""
LINE_BEND = 0.25
"""Farthest that a line's middle lies off its ends' connection, as a share of its length."""
BAND_SHARE = (0.05, 0.45)
"""Of the image, that a band covers: less than half, so that it is the band which is out of the ordinary."""
BAND_WAVE = 0.04
"""Largest amplitude of a band's edge, as a share of the image's shorter side."""
_CURVE_POINTS = 48


def line_mask(shape: tuple[int, int], *, generator: np.random.Generator) -> BinaryMask:
    """Draw a thin, slightly bent line of any direction.

    It is a quadratic Bezier curve; see `LINE_LENGTH`, `WIDEST_LINE` and `LINE_BEND`.

    Args:
        shape: rows and columns, in pixels.
        generator: draws place, direction, length, bend and width.

    Returns:
        bool, shape `shape`; at least one pixel is True, as the line's middle lies inside the image.
    """
    side = min(shape)
    length = generator.uniform(*LINE_LENGTH) * side
    angle = generator.uniform(0.0, np.pi)
    forward, aside = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    bend = generator.uniform(-LINE_BEND, LINE_BEND) * length
    t = np.linspace(-1.0, 1.0, _CURVE_POINTS)[:, None]
    middle = generator.uniform(0.0, 1.0, 2) * (shape[1] - 1, shape[0] - 1)  # x, y
    points = middle + 0.5 * length * t * forward - bend * t**2 * aside
    width = int(generator.integers(1, max(1, int(WIDEST_LINE * side)), endpoint=True))
    canvas = Image.new("1", (shape[1], shape[0]))
    ImageDraw.Draw(canvas).line([(float(x), float(y)) for x, y in points], fill=1, width=width, joint="curve")
    return np.array(canvas, dtype=np.bool_)


def band_mask(shape: tuple[int, int], *, generator: np.random.Generator) -> BinaryMask:
    """Draw a band that reaches across the image: one side of a wavy line, or what lies between two.

    Args:
        shape: rows and columns, in pixels.
        generator: draws direction, share of the image, wave, and whether it has one edge or two.

    Returns:
        bool, shape `shape`; the share of True pixels lies in `BAND_SHARE`.
    """
    side = min(shape)
    angle = generator.uniform(0.0, 2.0 * np.pi)
    rows, columns = np.indices(shape)
    across = np.cos(angle) * columns + np.sin(angle) * rows
    along = -np.sin(angle) * columns + np.cos(angle) * rows
    wavelength, phase = generator.uniform(0.5, 2.0) * side, generator.uniform(0.0, 2.0 * np.pi)
    position = across + generator.uniform(0.0, BAND_WAVE) * side * np.sin(2.0 * np.pi * along / wavelength + phase)
    share = generator.uniform(*BAND_SHARE)
    if generator.random() < 0.5:
        center = np.quantile(position, generator.uniform(0.5 * share, 1.0 - 0.5 * share))
        position = -np.abs(position - center)
    mask: BinaryMask = position > np.quantile(position, 1.0 - share)
    return mask
