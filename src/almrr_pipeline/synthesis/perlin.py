"""Perlin noise and masks cut from it (stage 1 of ALMRR, arXiv 2407.17705; DRAEM, 2108.07610, 3.1).

The noise follows K. Perlin, "Improving noise" (SIGGRAPH 2002), with DRAEM's choices: gradients of
length 1 at the nodes of a grid, the fade curve 6 t^5 - 15 t^4 + 10 t^3, and the factor sqrt(2) that
brings the range to [-1, 1].
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from almrr_pipeline.common.arrays import MaskArray
from almrr_pipeline.common.errors import AlmrrError

Noise = npt.NDArray[np.float32]

LARGEST_ROTATION = 90.0  # degrees either way, as in DRAEM
MOST_DRAWS = 200  # in search of a mask that is not empty: about one in 18 is, by the paper's values


class _Axis(NamedTuple):
    """Positions of an axis's pixels in the grid, in cells; each array has shape (length,)."""

    cell: npt.NDArray[np.intp]  # index of the node before; the node after is one more
    before: Noise  # distance to the node before, in [0, 1)
    after: Noise  # distance to the node after, in [-1, 0)
    fade: Noise  # weight of the node after, in [0, 1); the node before has the rest


def perlin_noise(
    shape: tuple[int, int], *, cells: tuple[int, int], generator: np.random.Generator
) -> Noise:
    """Draw Perlin noise, float32 in [-1, 1], 0 at the nodes.

    Pixel p of an axis with n pixels and c cells is at p c / n, so the first pixel is on a node; n
    need not be a multiple of c. Noise is linear in the gradients and its weights are products of
    one factor per axis: gradients are combined along x once for each row of nodes, then along y for
    each pixel.

    Args:
        shape: rows and columns, in pixels.
        cells: grid cells along rows and columns.
        generator: draws (cells[0] + 1) * (cells[1] + 1) angles.
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


@lru_cache(maxsize=64)
def _lay_axis(length: int, cells: int) -> _Axis:
    position = np.arange(length) * (cells / length)
    cell = np.minimum(position.astype(np.intp), cells - 1)
    t = position - cell
    fade = 6 * t**5 - 15 * t**4 + 10 * t**3
    single = [values.astype(np.float32) for values in (t, t - 1.0, fade)]
    return _Axis(cell, *single)
