from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from almrr_pipeline.config import SynthesisSettings
from almrr_pipeline.synthesis.simulate import Sample, Stream, make_generator, simulate_sample
from almrr_pipeline.synthesis.textures import has_color

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """Normal images and textures."""
    generator = np.random.default_rng(0)
    return generator.integers(90, 160, (5, 64, 48, 3), np.uint8), generator.integers(
        0, 256, (7, 64, 48, 3), np.uint8
    )


def simulate(number: int, arrays: Arrays, *, seed: int = 5, **settings: Any) -> Sample:
    normals, textures = arrays
    return simulate_sample(
        number,
        normals=normals,
        textures=textures,
        settings=SynthesisSettings(**settings),
        seed=seed,
    )


def test_sample_without_anomaly_is_its_normal_image(arrays: Arrays) -> None:
    empty = 0
    for number in range(60):
        augmented, mask, normal_index = simulate(number, arrays)
        np.testing.assert_array_equal(augmented[~mask], arrays[0][normal_index][~mask])
        empty += not mask.any()
    assert 20 <= empty <= 40


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, False), (1.0, True)])
def test_fraction_of_samples_without_anomaly_is_exact_at_its_ends(
    arrays: Arrays, fraction: float, expected: bool
) -> None:
    masks = [simulate(k, arrays, seed=1, anomaly_free=fraction).mask for k in range(30)]
    assert {not mask.any() for mask in masks} == {expected}


@pytest.mark.parametrize("color", ["match", "keep"])
def test_an_anomaly_in_a_gray_image_is_gray_if_colors_are_to_match(
    arrays: Arrays, color: str
) -> None:
    gray = np.repeat(arrays[0][..., :1], 3, axis=-1), arrays[1]
    settings = {"anomaly_free": 0.0, "opacity": (0.0, 0.0), "operations": 0, "color": color}
    samples = [
        simulate(k, gray, seed=1, grid_exponents=(0, 3), **settings).augmented for k in range(10)
    ]
    assert any(has_color(sample) for sample in samples) == (color == "keep")


def test_an_anomaly_in_a_colored_image_keeps_its_color(arrays: Arrays) -> None:
    kept, matched = (
        simulate(4, arrays, seed=1, anomaly_free=0.0, grid_exponents=(0, 3), color=color)
        for color in ("keep", "match")
    )
    assert kept.mask.any()
    np.testing.assert_array_equal(kept.augmented, matched.augmented)


def test_another_exposure_of_the_image_needs_no_texture(arrays: Arrays) -> None:
    normals = arrays[0]
    no_textures = np.zeros((0, *normals.shape[1:]), np.uint8)
    settings = {"anomaly_free": 0.0, "opacity": (0.0, 0.0)}
    materials = {"texture": 0.0, "exposure": 1.0}
    for number in range(20):
        augmented, mask, normal_index = simulate(
            number, (normals, no_textures), materials=materials, **settings
        )
        before, after = (image[mask].astype(float) for image in (normals[normal_index], augmented))
        # One curve for all values: equal ones stay equal, and their order stays.
        order = np.argsort(before, axis=None, kind="stable")
        assert (np.diff(after.ravel()[order]) >= 0).all()
        assert abs(after.mean() / before.mean() - 1) > 0.1


def test_the_texture_is_drawn_before_the_mask(arrays: Arrays) -> None:
    """The order of the draws is part of what a seed stands for: another one makes other sets."""
    normals, textures = arrays
    for number in range(20):
        augmented, mask, _ = simulate(
            number, arrays, anomaly_free=0.0, opacity=(0.0, 0.0), operations=0
        )
        generator = make_generator(5, number, Stream.TRAINING)
        generator.integers(len(normals))
        generator.random()
        texture = textures[generator.integers(len(textures))]
        np.testing.assert_array_equal(augmented[mask], texture[mask])


def test_shapes_come_by_their_weights(arrays: Arrays) -> None:
    weights = {"line": 3.0, "band": 1.0, "perlin": 0.0}
    areas = [simulate(k, arrays, anomaly_free=0.0, shapes=weights).mask.mean() for k in range(120)]
    assert 0.65 < np.mean(np.array(areas) < 0.04) < 0.85  # a band covers 5 % at least


def test_choices_without_a_weight_change_nothing(arrays: Arrays) -> None:
    weights = {
        "materials": {"texture": 2.0, "exposure": 0.0},
        "shapes": {"line": 0.0, "perlin": 0.5},
    }
    for number in range(10):
        np.testing.assert_array_equal(
            simulate(number, arrays, **weights).augmented, simulate(number, arrays).augmented
        )


def test_anomaly_is_seen_where_the_mask_is(arrays: Arrays) -> None:
    changed = []
    for number in range(20):
        augmented, mask, normal_index = simulate(
            number, arrays, seed=1, anomaly_free=0.0, opacity=(0.0, 0.0), grid_exponents=(0, 3)
        )
        changed.append((augmented[mask] != arrays[0][normal_index][mask]).any(axis=-1).mean())
    assert np.mean(changed) > 0.95


def test_all_images_are_used(arrays: Arrays) -> None:
    assert {simulate(k, arrays).normal_index for k in range(60)} == set(range(5))


def test_streams_and_numbers_and_seeds_draw_different_values() -> None:
    streams = [(seed, k, stream) for seed in (0, 1) for k in (0, 1, 2) for stream in Stream]
    assert len({make_generator(*each).random() for each in streams}) == len(streams)
