"""Drawn defects of the sample suite: scratch, stain, dent, hole, thread, smear, chip.

They are test material, made of geometry, shading and material, with light from the upper left; they
share nothing with the anomalies that are simulated for training.

A surface is float64 in [0, 1], shape (S, S), gray, before a camera takes it. The `strength` in
(0, 1] sets a drawing's contrast; the generator draws sizes and places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import interpolate, ndimage, spatial

from almrr_pipeline.common.arrays import Floats

Drawing = Callable[[Floats, Generator, float], Floats]
_Shape = tuple[int, ...]

LIGHT = np.array([-0.6, -0.8]) / np.hypot(0.6, 0.8)
"""Direction of the light as a unit vector of rows and columns: from the upper left."""
_CURVE_POINTS = 600  # points of a curve, less than half a pixel apart

_CENTERS = (0.22, 0.78)  # range of the centers of defects, as fractions of the surface's sides


class _Curve(NamedTuple):
    """Signed distance of each pixel from a curve, and place of its nearest point, 0 to 1."""

    across: Floats
    along: Floats


class _Outline(NamedTuple):
    """Distance of each pixel from a closed shape's edge (inside: positive) and from its center."""

    inside: Floats
    rows: Floats
    columns: Floats


def draw_scratch(surface: Floats, generator: Generator, strength: float) -> Floats:
    """A long, nearly straight groove: dark away from the light, bright where torn open."""
    length = generator.uniform(0.45, 0.9) * len(surface)
    curve = _draw_curve(surface.shape, generator, length=length, bend=0.05)
    width = generator.uniform(1.3, 2.6) * _taper(curve.along)
    groove = _bump(curve.across, width)
    ridge = _bump(curve.across - 1.6 * width, width)
    periods = generator.uniform(1, 3) * curve.along + generator.uniform()
    pressure = 0.7 + 0.3 * np.sin(2 * np.pi * periods)
    torn_open = surface.mean() + 2.0 * surface.std() + 0.1 + 0.2 * strength
    scratched = _mix(surface, torn_open, (0.6 + 0.4 * strength) * pressure * ridge)
    return _mix(scratched, 0.3 * surface.mean(), (0.6 + 0.4 * strength) * pressure * groove)


def draw_stain(surface: Floats, generator: Generator, strength: float) -> Floats:
    """A dried liquid: darker, with the texture shining through and an even darker edge."""
    size = generator.uniform(0.1, 0.2) * len(surface)
    outline = _draw_outline(surface.shape, generator, size, 1.6, unevenness=0.16)
    covered = _edge(outline.inside, softness=generator.uniform(0.8, 2.0))
    rim = covered * np.exp(-((outline.inside / 3.0) ** 2))
    soaked = _mix(surface, ndimage.gaussian_filter(surface, 1.5), 0.65 * covered)
    return soaked * (1.0 - (0.26 + 0.34 * strength) * covered - 0.2 * strength * rim)


def draw_dent(surface: Floats, generator: Generator, strength: float) -> Floats:
    """A hollow: shaded on the side of the light, bright on the other, its texture drawn inward."""
    size = generator.uniform(0.1, 0.18) * len(surface)
    outline = _draw_outline(surface.shape, generator, size, 1.4, unevenness=0.05)
    bowl = np.clip(outline.inside / size, 0.0, 1.0)  # 0 at the edge, 1 in the middle
    slope = np.stack(np.gradient(-ndimage.gaussian_filter((bowl * (2.0 - bowl)) ** 2, 1.5)))
    slope /= np.abs(slope).max()
    places = np.indices(surface.shape) + 2.0 * slope
    warped = ndimage.map_coordinates(surface, places, order=1, mode="nearest")
    facing = -np.tensordot(LIGHT, slope, axes=1)  # what rises toward the light faces away from it
    shading = np.where(facing > 0, 0.9, 0.75) * (0.45 + 0.55 * strength) * facing
    return np.asarray(warped * (1.0 + shading))


def draw_hole(surface: Floats, generator: Generator, strength: float) -> Floats:
    """A piece broken out: nearly black, lighter where light reaches it, with a bright edge."""
    size = generator.uniform(0.05, 0.115) * len(surface)
    outline = _draw_outline(surface.shape, generator, size, 1.5, unevenness=0.2)
    covered = _edge(outline.inside, softness=0.6)
    away = -(LIGHT[0] * outline.rows + LIGHT[1] * outline.columns) / size
    bottom = 0.06 + 0.3 * (1.0 - strength) * surface.mean() + 0.08 * np.clip(away, 0.0, 1.0)
    grit = ndimage.gaussian_filter(generator.standard_normal(surface.shape), 0.8)
    holed = _mix(surface, bottom + 0.03 * grit, covered)
    broken = np.exp(-(((outline.inside + 1.2) / 1.3) ** 2)) * np.clip(away, 0.0, 1.0)
    return _mix(holed, surface.mean() + 0.35, (0.3 + 0.5 * strength) * broken)


def draw_thread(surface: Floats, generator: Generator, strength: float) -> Floats:
    """A fiber on the surface: round, lit from one side, with a cast shadow."""
    length = generator.uniform(0.5, 1.0) * len(surface)
    curve = _draw_curve(surface.shape, generator, length=length, bend=0.55)
    radius = generator.uniform(1.0, 2.0)
    present = (curve.along > 0.0) & (curve.along < 1.0)
    body = np.clip(radius + 0.5 - np.abs(curve.across), 0.0, 1.0) * present
    shadow = ndimage.gaussian_filter(ndimage.shift(body, -2.0 * LIGHT, order=1), 1.0)
    tone = surface.mean() + (0.3 + 0.3 * strength) if generator.random() < 0.7 else 0.12
    roundness = 1.0 + 0.18 * np.clip(curve.across / radius, -1.0, 1.0)
    shaded = surface * (1.0 - (0.15 + 0.3 * strength) * shadow)
    return _mix(shaded, tone * roundness, (0.55 + 0.4 * strength) * body)


def draw_smear(surface: Floats, generator: Generator, strength: float) -> Floats:
    """A wiped stroke: texture rubbed out along it, under a lighter or darker film."""
    size = generator.uniform(0.1, 0.17) * len(surface)
    angle = generator.uniform(0.0, np.pi)
    outline = _draw_outline(surface.shape, generator, size, 2.6, unevenness=0.1, angle=angle)
    covered = _edge(outline.inside, softness=2.0)
    direction = np.array([np.sin(angle), np.cos(angle)])
    reach = np.linspace(-1.0, 1.0, 15) * generator.uniform(6.0, 14.0)
    steps = [ndimage.shift(surface, k * direction, order=1, mode="reflect") for k in reach]
    rubbed = np.mean(steps, axis=0)
    across = direction[0] * outline.columns - direction[1] * outline.rows
    streaks = 1.0 + 0.35 * _draw_bands(across, generator, width=2.0)
    film = generator.choice([-1.0, 1.0]) * (0.08 + 0.16 * strength) * streaks
    return _mix(surface, rubbed + film, (0.65 + 0.3 * strength) * covered)


def draw_chip(surface: Floats, generator: Generator, strength: float) -> Floats:
    """A splinter of another material: its own grain, lit edges, a cast shadow."""
    size = generator.uniform(0.04, 0.085) * len(surface)
    angle = generator.uniform(0.0, np.pi)
    outline = _draw_outline(surface.shape, generator, size, 3.0, unevenness=0.06, angle=angle)
    body = _edge(outline.inside, softness=0.5)
    shadow = ndimage.gaussian_filter(ndimage.shift(body, -3.0 * LIGHT, order=1), 1.2)
    across = np.cos(angle) * outline.rows - np.sin(angle) * outline.columns
    bands = _draw_bands(across, generator, width=0.8)
    slope = np.stack(np.gradient(ndimage.gaussian_filter(body, 1.0)))
    lit = 0.8 * np.tensordot(-LIGHT, slope, axes=1)
    away_from_mean = (0.2 + 0.25 * strength) * (1.0 if generator.random() < 0.6 else -1.0)
    material = surface.mean() + away_from_mean + 0.06 * bands + lit
    shaded = surface * (1.0 - (0.2 + 0.35 * strength) * shadow)
    return _mix(shaded, material, body)


_ALL = (draw_scratch, draw_stain, draw_dent, draw_hole, draw_thread, draw_smear, draw_chip)
DRAWINGS: dict[str, Drawing] = {draw.__name__.removeprefix("draw_"): draw for draw in _ALL}
"""Defect types by name."""


def _mix(below: Floats, above: Floats | float, opacity: Floats | float) -> Floats:
    return below + (above - below) * opacity


def _bump(distance: Floats, width: Floats) -> Floats:
    """1 at distance 0, falling to 0 over about two widths; a width of 0 has no bump."""
    return np.where(width > 1e-3, np.exp(-((distance / np.maximum(width, 1e-3)) ** 2)), 0.0)


def _edge(inside: Floats, *, softness: float) -> Floats:
    """0 outside, 1 inside, rising over `softness` pixels on either side of the edge."""
    return 1.0 / (1.0 + np.exp(-np.clip(4.0 * inside / softness, -60.0, 60.0)))


def _taper(along: Floats) -> Floats:
    """1 in the middle of a curve, 0 at and beyond its ends."""
    return np.clip(4.0 * along * (1.0 - along), 0.0, 1.0) ** 0.5


def _draw_bands(across: Floats, generator: Generator, *, width: float) -> Floats:
    """Draw uneven parallel bands, `width` pixels wide, of mean 0 and std 1, along `across`."""
    fine = ndimage.gaussian_filter1d(generator.standard_normal(8 * len(across)), 2.0 * width)
    places = np.arange(len(fine)) / 2.0 - 2.0 * len(across)
    return np.asarray(np.interp(across, places, (fine - fine.mean()) / fine.std()))


def _draw_curve(shape: _Shape, generator: Generator, *, length: float, bend: float) -> _Curve:
    """Draw a smooth curve through five points; `bend` is their spread, per `length`."""
    angle = generator.uniform(0.0, np.pi)
    forward = np.array([np.sin(angle), np.cos(angle)])
    aside = np.array([np.cos(angle), -np.sin(angle)])
    knots = np.linspace(-0.5, 0.5, 5)
    offsets = bend * generator.uniform(-0.5, 0.5, 5)
    deflected = np.outer(knots, forward) + np.outer(offsets, aside)
    corners = generator.uniform(*_CENTERS, 2) * shape + length * deflected
    positions = np.linspace(0.0, 1.0, _CURVE_POINTS)
    spline = interpolate.CubicSpline(knots + 0.5, corners)
    points, tangents = spline(positions), spline(positions, 1)
    pixels = np.indices(shape).reshape(2, -1).T
    distance, nearest = spatial.cKDTree(points).query(pixels)
    tangent, offset = tangents[nearest], pixels - points[nearest]
    side = np.sign(tangent[:, 0] * offset[:, 1] - tangent[:, 1] * offset[:, 0])
    return _Curve((side * distance).reshape(shape), positions[nearest].reshape(shape))


def _draw_outline(
    shape: _Shape,
    generator: Generator,
    size: float,
    stretch: float,
    *,
    unevenness: float,
    angle: float | None = None,
) -> _Outline:
    """Draw an ellipse with an uneven edge.

    `size` is the mean radius in pixels, `stretch` the largest ratio of the axes, `unevenness` the
    amplitude of the edge's waves per radius, `angle` that of the long axis in radians, from the
    columns' axis toward the rows'; it is drawn if it is None.
    """
    center = generator.uniform(*_CENTERS, 2) * shape
    if angle is None:
        angle = generator.uniform(0.0, np.pi)
    ratio = generator.uniform(0.5 + 0.5 * stretch, stretch) ** 0.5
    rows, columns = np.indices(shape) - center[:, None, None]
    along = (np.sin(angle) * rows + np.cos(angle) * columns) / ratio
    across = (np.cos(angle) * rows - np.sin(angle) * columns) * ratio
    direction, distance = np.arctan2(across, along), np.hypot(along, across)
    waves = np.arange(2, 9)
    amplitudes = unevenness * generator.normal(size=len(waves)) * 2.0 / waves
    phases = generator.uniform(0.0, 2.0 * np.pi, len(waves))
    edge = np.cos(np.multiply.outer(waves, direction) + phases[:, None, None])
    radius = 1.0 + np.tensordot(amplitudes, edge, axes=1)
    return _Outline(size * np.maximum(radius, 0.3) - distance, rows, columns)
