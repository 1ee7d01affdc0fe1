"""Masks of simulated anomalies: Perlin noise (arXiv 2407.17705; DRAEM, 2108.07610, 3.1) and shapes.

The noise follows K. Perlin, "Improving noise" (SIGGRAPH 2002), with DRAEM's choices: gradients of
length 1 at the nodes of a grid, the fade curve 6 t^5 - 15 t^4 + 10 t^3, and the factor sqrt(2) that
brings the range to [-1, 1].

Above a threshold it makes blobs. Cracks and scratches are lines of a pixel or a few, and a surface
that was ground, coated or lit unevenly differs from one edge of the image to the other; a network
trained on blobs alone misses both. So there are lines and bands, too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from almrr_pipeline.common.arrays import MaskArray
from almrr_pipeline.common.errors import AlmrrError

Noise = npt.NDArray[np.float32]

LARGEST_ROTATION = 90.0  # degrees either way, as in DRAEM
MOST_DRAWS = 200  # in search of a mask that is not empty: about one in 18 is, by the paper's values
# Lengths are fractions of the image's shorter side.
LINE_LENGTH = (0.08, 0.6)
WIDEST_LINE = 1 / 64  # the thinnest line is a pixel wide
LINE_BEND = 0.25  # largest distance of a line's middle from its chord, as a fraction of its length
BAND_FRACTION = (0.05, 0.45)  # of the image's area: below half, so that the band is what is unusual
BAND_WAVE = 0.04  # largest amplitude of a band's edge
_CURVE_POINTS = 48  # corners of a line's polygon, which keeps within 0.0001 sides of the curve


class _Axis(NamedTuple):
    """Positions of an axis's pixels in the grid, in cells; each array has shape (length,)."""

    cell: npt.NDArray[np.intp]  # index of the node before; the node after is one more
    before: Noise  # distance to the node before, in [0, 1)
    after: Noise  # distance to the node after, in [-1, 0)
    fade: Noise  # weight of the node after, in [0, 1); the node before has the rest


def perlin_noise(
    shape: tuple[int, int], *, cells: tuple[int, int], generator: np.random.Generator
) -> Noise:
    """Draw Perlin noise, float32 in [-1, 1], 0 at the nodes, of `shape` (rows, columns) in pixels.

    Pixel p of an axis with n pixels and c `cells` is at p c / n, so the first pixel is on a node; n
    need not be a multiple of c. Noise is linear in the gradients and its weights are products of
    one factor per axis: gradients are combined along x once for each row of nodes, then along y for
    each pixel.
    """
    nodes = (cells[0] + 1, cells[1] + 1)
    angles = generator.uniform(0.0, 2.0 * np.pi, nodes).astype(np.float32)
    y, x = _lay_axis(shape[0], cells[0]), _lay_axis(shape[1], cells[1])
    gradient_y, gradient_x = np.sin(angles), np.cos(angles)
    left, right = 1.0 - x.fade, x.fade
    before, after = left * x.before, right * x.after
    # Along a row of nodes, for every column: the gradients' contribution per unit of y (slope) and
    # from x alone (offset); both have shape (rows of nodes, columns).
    slope = gradient_y[:, x.cell] * left + gradient_y[:, x.cell + 1] * right
    offset = gradient_x[:, x.cell] * before + gradient_x[:, x.cell + 1] * after
    above = slope[y.cell] * y.before[:, None] + offset[y.cell]  # (rows, columns)
    below = slope[y.cell + 1] * y.after[:, None] + offset[y.cell + 1]
    noise: Noise = np.float32(np.sqrt(2.0)) * (above + y.fade[:, None] * (below - above))
    return noise


def perlin_mask(
    shape: tuple[int, int],
    *,
    grid_exponents: tuple[int, int],
    threshold: float,
    generator: np.random.Generator,
) -> MaskArray:
    """Draw the mask of one anomaly: rotated Perlin noise above a threshold, True somewhere.

    An empty mask is drawn again. DRAEM counts such a sample as free of anomalies instead, which
    makes their fraction larger than the one that was set.

    Args:
        shape: rows and columns, in pixels.
        grid_exponents: 2^k cells per axis, k drawn per axis from this range, ends included.
        threshold: noise above it is anomalous; in (0, 1).
        generator: draws exponents, gradients and the angle.

    Raises:
        AlmrrError: all of 200 masks were empty, because the threshold is too close to 1.
    """
    lowest, highest = grid_exponents
    for _ in range(MOST_DRAWS):
        rows, columns = 2 ** generator.integers(lowest, highest, 2, endpoint=True)
        noise = perlin_noise(shape, cells=(int(rows), int(columns)), generator=generator)
        angle = generator.uniform(-LARGEST_ROTATION, LARGEST_ROTATION)
        # About the center, bilinear, with 0 outside, as in DRAEM.
        rotated = Image.fromarray(noise).rotate(angle, Image.Resampling.BILINEAR, fillcolor=0.0)
        mask: MaskArray = np.asarray(rotated) > threshold
        if mask.any():
            return mask
    raise AlmrrError(
        f"synthesis.threshold: no Perlin noise above {threshold} in {MOST_DRAWS} draws with "
        f"2^{lowest} to 2^{highest} cells per axis; lower the threshold (the paper takes 0.5)."
    )


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


@lru_cache(maxsize=64)
def _lay_axis(length: int, cells: int) -> _Axis:
    position = np.arange(length) * (cells / length)
    cell = np.minimum(position.astype(np.intp), cells - 1)
    t = position - cell
    fade = 6 * t**5 - 15 * t**4 + 10 * t**3
    single = [values.astype(np.float32) for values in (t, t - 1.0, fade)]
    return _Axis(cell, *single)
