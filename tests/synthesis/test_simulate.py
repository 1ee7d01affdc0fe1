from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from numpy.lib.format import open_memmap

from almrr_pipeline.common.images import read_image, resize_image
from almrr_pipeline.synthesis.simulate import (
    AnomalyRecipe,
    CropTask,
    ResizeTask,
    Stream,
    make_generator,
    scale_image,
    simulate_sample,
    write_crops,
    write_resized,
)
from almrr_pipeline.synthesis.textures import has_color

RECIPE = AnomalyRecipe(anomaly_free=0.5, grid_exponents=(0, 5), threshold=0.5, opacity=(0.0, 0.8), operations=3, seed=5)
Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """Normal images and textures."""
    generator = np.random.default_rng(0)
    return generator.integers(90, 160, (5, 64, 48, 3), np.uint8), generator.integers(0, 256, (7, 64, 48, 3), np.uint8)


def test_sample_without_anomaly_is_its_normal_image(arrays: Arrays) -> None:
    normals, textures = arrays
    empty = 0
    for number in range(60):
        augmented, mask, source = simulate_sample(number, normals=normals, textures=textures, recipe=RECIPE)
        np.testing.assert_array_equal(augmented[~mask], normals[source][~mask])
        empty += not mask.any()
    assert 20 <= empty <= 40


@pytest.mark.parametrize(("share", "expected"), [(0.0, False), (1.0, True)])
def test_share_of_samples_without_anomaly_is_kept_exactly_at_its_ends(
    arrays: Arrays, share: float, expected: bool
) -> None:
    recipe = AnomalyRecipe(share, (0, 5), 0.5, (0.0, 0.8), 3, 1)
    masks = [simulate_sample(k, normals=arrays[0], textures=arrays[1], recipe=recipe)[1] for k in range(30)]
    assert {not mask.any() for mask in masks} == {expected}


@pytest.mark.parametrize("match", [True, False])
def test_an_anomaly_in_a_gray_image_is_gray_if_colors_are_to_match(arrays: Arrays, match: bool) -> None:
    gray = np.repeat(arrays[0][..., :1], 3, axis=-1)
    recipe = AnomalyRecipe(0.0, (0, 3), 0.5, (0.0, 0.0), 0, 1, match_color=match)
    samples = [simulate_sample(k, normals=gray, textures=arrays[1], recipe=recipe)[0] for k in range(10)]
    assert any(has_color(sample) for sample in samples) != match


def test_an_anomaly_in_a_colored_image_keeps_its_color(arrays: Arrays) -> None:
    recipes = [AnomalyRecipe(0.0, (0, 3), 0.5, (0.0, 0.8), 3, 1, match_color=match) for match in (True, False)]
    kept, matched = (simulate_sample(4, normals=arrays[0], textures=arrays[1], recipe=recipe)[0] for recipe in recipes)
    np.testing.assert_array_equal(kept, matched)


def test_another_exposure_of_the_image_needs_no_texture(arrays: Arrays) -> None:
    recipe = replace(RECIPE, anomaly_free=0.0, opacity=(0.0, 0.0), materials={"exposure": 1.0})
    normals = arrays[0]
    none = np.zeros((0, *normals.shape[1:]), np.uint8)
    for number in range(20):
        augmented, mask, source = simulate_sample(number, normals=normals, textures=none, recipe=recipe)
        before, after = (image[mask].astype(float) for image in (normals[source], augmented))
        # One curve for all values: equal ones stay equal, and their order stays.
        order = np.argsort(before, axis=None, kind="stable")
        assert (np.diff(after.ravel()[order]) >= 0).all()
        assert abs(after.mean() / before.mean() - 1) > 0.1


def test_the_texture_is_drawn_before_the_mask(arrays: Arrays) -> None:
    """The order of the draws is part of what a seed stands for: another one would make other pools."""
    normals, textures = arrays
    recipe = replace(RECIPE, anomaly_free=0.0, opacity=(0.0, 0.0), operations=0)
    for number in range(20):
        augmented, mask, _ = simulate_sample(number, normals=normals, textures=textures, recipe=recipe)
        generator = make_generator(recipe.seed, number, Stream.TRAINING)
        generator.integers(len(normals))
        generator.random()
        np.testing.assert_array_equal(augmented[mask], textures[generator.integers(len(textures))][mask])


def test_materials_and_shapes_come_by_their_shares(arrays: Arrays) -> None:
    shares = {"line": 3.0, "band": 1.0, "perlin": 0.0}
    recipe = replace(RECIPE, anomaly_free=0.0, shapes=shares)
    areas = [simulate_sample(k, normals=arrays[0], textures=arrays[1], recipe=recipe)[1].mean() for k in range(120)]
    assert 0.65 < np.mean(np.array(areas) < 0.04) < 0.85  # a band covers 5 % at least


def test_kinds_without_a_share_change_nothing(arrays: Arrays) -> None:
    listed = replace(RECIPE, materials={"texture": 2.0, "exposure": 0.0}, shapes={"line": 0.0, "perlin": 0.5})
    for number in range(10):
        given, expected = (
            simulate_sample(number, normals=arrays[0], textures=arrays[1], recipe=recipe) for recipe in (listed, RECIPE)
        )
        np.testing.assert_array_equal(given[0], expected[0])


def test_anomaly_is_seen_where_the_mask_is(arrays: Arrays) -> None:
    normals, textures = arrays
    recipe = AnomalyRecipe(0.0, (0, 3), 0.5, (0.0, 0.0), 3, 1)
    changed = []
    for number in range(20):
        augmented, mask, source = simulate_sample(number, normals=normals, textures=textures, recipe=recipe)
        changed.append((augmented[mask] != normals[source][mask]).any(axis=-1).mean())
    assert np.mean(changed) > 0.95


def test_all_images_are_used(arrays: Arrays) -> None:
    sources = {simulate_sample(k, normals=arrays[0], textures=arrays[1], recipe=RECIPE)[2] for k in range(60)}
    assert sources == set(range(5))


def test_streams_and_numbers_and_seeds_draw_different_values() -> None:
    streams = [(seed, number, stream) for seed in (0, 1) for number in (0, 1, 2) for stream in Stream]
    assert len({make_generator(*each).random() for each in streams}) == len(streams)


def test_resized_images_are_those_of_the_one_resize_function(tmp_path: Path, images: SimpleNamespace) -> None:
    target = tmp_path / "normals.npy"
    open_memmap(target, mode="w+", dtype=np.uint8, shape=(5, 32, 16, 3))
    assert write_resized(ResizeTask(tuple(images.training), target, start=1)) == 4
    written = np.load(target)
    assert not written[0].any()
    for row, path in enumerate(images.training, start=1):
        np.testing.assert_array_equal(written[row], resize_image(read_image(path), (32, 16)))


def test_crops_are_cut_out_of_the_scaled_image_and_differ(tmp_path: Path, images: SimpleNamespace) -> None:
    target = tmp_path / "normals.npy"
    open_memmap(target, mode="w+", dtype=np.uint8, shape=(9, 32, 16, 3))
    path = images.training[0]
    write_crops(CropTask(path, target, (0, 3, 6), 1.5, 7, Stream.TRAINING_CROPS))
    written = np.load(target)
    scaled = scale_image(read_image(path), scale=1.5, at_least=(32, 16))
    assert scaled.shape == (90, 135, 3)
    windows = np.lib.stride_tricks.sliding_window_view(scaled[..., 0], (32, 16))
    places = [np.argwhere((windows == written[row, ..., 0]).all(axis=(2, 3))) for row in (0, 3, 6)]
    assert [len(found) for found in places] == [1, 1, 1]
    assert len({tuple(found[0]) for found in places}) == 3
    assert not written[[1, 2, 4, 5, 7, 8]].any()


def test_image_smaller_than_a_crop_is_reflected_around() -> None:
    image = np.arange(4, dtype=np.uint8)[None, :, None].repeat(6, 0).repeat(3, 2)
    padded = scale_image(image, scale=1.0, at_least=(6, 7))
    assert padded[0, :, 0].tolist() == [1, 0, 1, 2, 3, 2, 1]
    np.testing.assert_array_equal(padded, padded[:1].repeat(6, 0))
