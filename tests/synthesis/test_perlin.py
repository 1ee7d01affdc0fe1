from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.synthesis.masks import perlin_mask, perlin_noise


def restate_noise(
    shape: tuple[int, int], cells: tuple[int, int], generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Perlin's noise by the textbook: four dot products a pixel, blended by the fade curve."""
    angles = generator.uniform(0.0, 2.0 * np.pi, (cells[0] + 1, cells[1] + 1))
    noise = np.empty(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            y, x = row * cells[0] / shape[0], column * cells[1] / shape[1]
            top, left = math.floor(y), math.floor(x)
            total = 0.0
            for node_y in (top, top + 1):
                for node_x in (left, left + 1):
                    angle = angles[node_y, node_x]
                    product = math.sin(angle) * (y - node_y) + math.cos(angle) * (x - node_x)
                    total += product * fade(1 - abs(y - node_y)) * fade(1 - abs(x - node_x))
            noise[row, column] = math.sqrt(2) * total
    return noise


def fade(t: float) -> float:
    return t * t * t * (t * (6 * t - 15) + 10)


def restate_rotation(noise: npt.NDArray[np.float64], degrees: float) -> npt.NDArray[np.float64]:
    """Rotate counter-clockwise: for each pixel, look up its origin, bilinear; outside is 0."""
    height, width = noise.shape
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotated = np.zeros_like(noise)
    for row in range(height):
        for column in range(width):
            down, right = row + 0.5 - height / 2, column + 0.5 - width / 2
            y, x = (
                height / 2 + sine * right + cosine * down,
                width / 2 + cosine * right - sine * down,
            )
            if 0 <= y < height and 0 <= x < width:
                rotated[row, column] = look_up(noise, y - 0.5, x - 0.5)
    return rotated


def look_up(noise: npt.NDArray[np.float64], y: float, x: float) -> float:
    top, left = math.floor(y), math.floor(x)
    total = 0.0
    for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
        for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
            inside = min(max(row, 0), noise.shape[0] - 1), min(max(column, 0), noise.shape[1] - 1)
            total += weight_y * weight_x * noise[inside]
    return total


@pytest.mark.parametrize(
    ("shape", "cells"), [((32, 32), (1, 1)), ((32, 48), (4, 8)), ((30, 37), (8, 2))]
)
def test_noise_equals_four_dot_products_a_pixel(
    shape: tuple[int, int], cells: tuple[int, int]
) -> None:
    noise = perlin_noise(shape, cells=cells, generator=np.random.default_rng(3))
    assert noise.dtype == np.float32
    np.testing.assert_allclose(
        noise, restate_noise(shape, cells, np.random.default_rng(3)), atol=2e-6
    )


def test_noise_is_zero_at_the_nodes_of_the_grid() -> None:
    noise = perlin_noise((32, 64), cells=(4, 8), generator=np.random.default_rng(0))
    np.testing.assert_allclose(noise[::8, ::8], 0.0, atol=1e-6)
    assert np.abs(noise).max() > 0.3


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(0, 5)] * 2),
    st.tuples(*[st.integers(1, 70)] * 2),
)
def test_noise_stays_within_one(
    seed: int, exponents: tuple[int, int], shape: tuple[int, int]
) -> None:
    cells = (2 ** exponents[0], 2 ** exponents[1])
    noise = perlin_noise(shape, cells=cells, generator=np.random.default_rng(seed))
    assert noise.shape == shape
    assert np.abs(noise).max() <= 1.0 + 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_mask_is_rotated_noise_above_the_threshold(seed: int) -> None:
    shape = (40, 56)
    mask = perlin_mask(
        shape, grid_exponents=(1, 3), threshold=0.4, generator=np.random.default_rng(seed)
    )
    generator = np.random.default_rng(seed)
    expected = np.zeros(shape)
    while not (expected > 0.4).any():
        rows, columns = (2 ** generator.integers(1, 4, 2)).tolist()
        noise = restate_noise(shape, (rows, columns), generator)
        expected = restate_rotation(noise, generator.uniform(-90.0, 90.0))
    clear = np.abs(expected - 0.4) > 1e-4
    np.testing.assert_array_equal(mask[clear], expected[clear] > 0.4)
    assert clear.mean() > 0.99


def test_no_mask_is_empty_though_single_cells_often_have_nothing_above_the_threshold() -> None:
    generator = np.random.default_rng(0)
    empty = sum(
        not (perlin_noise((64, 64), cells=(1, 1), generator=generator) > 0.5).any()
        for _ in range(40)
    )
    assert empty > 5
    assert all(
        perlin_mask((64, 64), grid_exponents=(0, 0), threshold=0.5, generator=generator).any()
        for _ in range(40)
    )


def test_masks_cover_about_a_twentieth_of_an_image_in_the_papers_setting() -> None:
    generator = np.random.default_rng(0)
    paper = {"grid_exponents": (0, 5), "threshold": 0.5}
    fractions = [perlin_mask((128, 128), **paper, generator=generator).mean() for _ in range(300)]
    assert 0.04 < np.median(fractions) < 0.07
    assert max(fractions) < 0.5


def test_a_threshold_that_nothing_exceeds_is_named_in_the_error() -> None:
    with pytest.raises(AlmrrError, match=r"synthesis\.threshold.*0\.999"):
        perlin_mask(
            (16, 16), grid_exponents=(0, 5), threshold=0.999, generator=np.random.default_rng(0)
        )
