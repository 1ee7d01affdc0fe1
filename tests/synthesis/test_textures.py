from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.synthesis import textures
from almrr_pipeline.synthesis.textures import OPERATIONS, Operation, alter_texture

GENERATOR_SEED = 11


@pytest.fixture
def texture() -> ImageArray:
    """Colors of all kinds, every value of each channel present."""
    values = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    values[..., 0].flat[:256] = values[..., 1].flat[:256] = values[..., 2].flat[:256] = np.arange(
        256
    )
    return values


def apply(operation: Operation, texture: ImageArray) -> ImageArray:
    return np.asarray(operation(Image.fromarray(texture), np.random.default_rng(GENERATOR_SEED)))


def draws() -> np.random.Generator:
    """What the operation under test draws from."""
    return np.random.default_rng(GENERATOR_SEED)


def test_there_are_ten_different_operations() -> None:
    assert len(set(OPERATIONS)) == 10


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_depends_on_its_generator_alone_and_keeps_size_and_dtype(
    operation: Operation, texture: ImageArray
) -> None:
    before = texture.copy()
    first, second = apply(operation, texture), apply(operation, texture)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(texture, before)
    assert (first.shape, first.dtype) == (texture.shape, np.uint8)


def test_gamma_is_a_power_of_its_own_in_each_channel(texture: ImageArray) -> None:
    powers = draws().uniform(0.5, 2.0, (3, 1)).ravel()
    expected = np.rint(255 * (texture / 255) ** powers)
    np.testing.assert_array_equal(apply(textures.adjust_gamma, texture), expected)


def test_brightness_multiplies_then_adds(texture: ImageArray) -> None:
    generator = draws()
    factor = generator.uniform(0.8, 1.2)
    expected = np.clip(np.rint(texture * factor + generator.uniform(-30, 30)), 0, 255)
    np.testing.assert_array_equal(apply(textures.adjust_brightness, texture), expected)


def test_sharpness_leaves_a_uniform_image_alone_and_changes_an_edge() -> None:
    uniform = np.full((9, 9, 3), 77, dtype=np.uint8)
    np.testing.assert_array_equal(apply(textures.adjust_sharpness, uniform), uniform)
    edge = uniform.copy()
    edge[:, 5:] = 200
    assert (apply(textures.adjust_sharpness, edge) != edge).any()


def test_hue_rotates_while_the_value_stays() -> None:
    red = np.zeros((4, 4, 3), dtype=np.uint8)
    red[..., 0] = 200
    rotated = apply(textures.shift_hue_and_saturation, red)
    assert rotated.max() == 200
    assert (rotated != red).any()


def test_solarize_inverts_from_the_threshold_upwards(texture: ImageArray) -> None:
    threshold = int(draws().integers(32, 129))
    expected = np.where(texture < threshold, texture, 255 - texture)
    np.testing.assert_array_equal(apply(textures.solarize, texture), expected)


def test_posterize_keeps_the_highest_bits(texture: ImageArray) -> None:
    bits = int(draws().integers(1, 9))
    np.testing.assert_array_equal(
        apply(textures.posterize, texture), texture >> (8 - bits) << (8 - bits)
    )


def test_invert_takes_each_value_from_255(texture: ImageArray) -> None:
    np.testing.assert_array_equal(apply(textures.invert, texture), 255 - texture)


def test_contrast_is_stretched_over_the_whole_range() -> None:
    dull = np.random.default_rng(0).integers(100, 140, (32, 32, 3), dtype=np.uint8)
    stretched = apply(textures.stretch_contrast, dull)
    assert (stretched.min(), stretched.max()) == (0, 255)


def test_equalize_makes_a_skewed_histogram_flat() -> None:
    skewed = np.repeat(np.linspace(0, 1, 64 * 64).reshape(64, 64, 1) ** 4 * 255, 3, axis=2).astype(
        np.uint8
    )
    flat = apply(textures.equalize, skewed)
    assert np.median(skewed) < 20
    assert 110 < np.median(flat) < 145


def test_rotation_keeps_the_middle_and_fills_the_corners_with_black() -> None:
    image = np.full((41, 41, 3), 180, dtype=np.uint8)
    rotated = apply(textures.rotate, image)
    assert (rotated[15:26, 15:26] == 180).all()
    assert (rotated[0, 0] == 0).all()


def test_as_many_different_operations_as_requested_are_applied_in_the_drawn_order(
    texture: ImageArray,
) -> None:
    for seed in range(10):
        generator = np.random.default_rng(seed)
        chosen = generator.permutation(10)[:3]
        expected = Image.fromarray(texture)
        for index in chosen:
            expected = OPERATIONS[index](expected, generator)
        altered = alter_texture(texture, count=3, generator=np.random.default_rng(seed))
        np.testing.assert_array_equal(altered, np.asarray(expected))
        assert len(set(chosen)) == 3


def test_no_operation_leaves_the_texture_as_it_is(texture: ImageArray) -> None:
    np.testing.assert_array_equal(
        alter_texture(texture, count=0, generator=np.random.default_rng(0)), texture
    )
