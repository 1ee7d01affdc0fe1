"""A mask is read rightly where that is certain, and what is doubtful is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import label

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.masks import (
    MaskReading,
    explain_size,
    inspect_mask,
    read_mask,
    resize_mask,
)

SHAPE = np.zeros((24, 32), bool)
SHAPE[4:10, 6:15] = True
LEVELS = SHAPE.astype(np.uint8) * 255
BLACK = np.zeros_like(LEVELS)


def _indexed(colors: list[int]) -> Image.Image:
    image = Image.fromarray(SHAPE.astype(np.uint8)).convert("P")
    image.putpalette(colors)
    return image


CERTAIN = {
    "white on black": Image.fromarray(LEVELS),
    "one bit": Image.fromarray(SHAPE),
    "0 and 1": Image.fromarray(SHAPE.astype(np.uint8)),
    "0 and 1 in 16 bits": Image.fromarray(SHAPE.astype(np.uint16)),
    "0 and 255 in 16 bits": Image.fromarray(LEVELS.astype(np.uint16)),
    "a palette of black and dark red": _indexed([0, 0, 0, 90, 0, 0]),
    "red on black": Image.fromarray(np.dstack([LEVELS, BLACK, BLACK])),
    "blue on black": Image.fromarray(np.dstack([BLACK, BLACK, LEVELS])),
    "alpha over black": Image.fromarray(np.dstack([BLACK, BLACK, BLACK, LEVELS])),
    "alpha over white": Image.fromarray(np.dstack([BLACK + 255] * 3 + [LEVELS])),
    "white with opaque alpha": Image.fromarray(np.dstack([LEVELS] * 3 + [BLACK + 255])),
    "the same in colors and alpha": Image.fromarray(np.dstack([LEVELS, LEVELS])),
}


@pytest.mark.parametrize("name", CERTAIN)
def test_what_is_certain_is_read_without_a_doubt(tmp_path: Path, name: str) -> None:
    CERTAIN[name].save(tmp_path / "mask.png")
    facts = inspect_mask(tmp_path / "mask.png")

    np.testing.assert_array_equal(facts.mask, SHAPE)
    assert facts.problem == ""
    assert facts.coverage == SHAPE.mean()


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr"])
@pytest.mark.parametrize(
    ("shown", "is_right"), [(LEVELS, True), (SHAPE * np.uint8(128), True), (255 - LEVELS, False)]
)
def test_masks_of_other_color_spaces_are_read_by_brightness(
    tmp_path: Path, mode: str, shown: np.ndarray, is_right: bool
) -> None:
    Image.fromarray(shown).convert("RGB").convert(mode).save(tmp_path / "mask.tif")
    facts = inspect_mask(tmp_path / "mask.tif")

    assert (facts.mask == SHAPE).all() == is_right
    assert ("inverted?" in facts.problem) != is_right


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint32, np.int16])
def test_masks_of_other_types_are_read_by_their_largest_value(
    tmp_path: Path, dtype: type[np.generic]
) -> None:
    tifffile.imwrite(tmp_path / "mask.tif", SHAPE.astype(dtype))

    np.testing.assert_array_equal(read_mask(tmp_path / "mask.tif"), SHAPE)


def test_a_mask_where_0_is_white_is_read_by_brightness(tmp_path: Path) -> None:
    dark = (~SHAPE).astype(np.uint16) * 65535
    tifffile.imwrite(tmp_path / "mask.tif", dark, photometric="miniswhite")

    np.testing.assert_array_equal(read_mask(tmp_path / "mask.tif"), SHAPE)


CLASSES = LEVELS // 255 * 200
CLASSES[15:20, 20:30] = 100
LARGE = BLACK.copy()
LARGE[1:22, 1:26] = 255


@pytest.mark.parametrize(
    ("levels", "problem"),
    [
        (255 - LEVELS, "covers 93% of the image: inverted"),
        (255 - LARGE, "covers 32% of the image: inverted"),
        (np.where(CLASSES == 100, 128, CLASSES // 200 * 255), "128, 255 of 255, both taken"),
        (LEVELS // 255 * 30, "values from 30 to 30 would be dropped"),
        (CLASSES, "values from 100 to 100 would be dropped"),
        (LEVELS // 255 * 100, "values from 100 to 100 would be dropped"),
        (LEVELS // 255 * 2, "holds the values 2 of 255"),
        (np.where(CLASSES == 100, 1, CLASSES // 100), "values from 1 to 2 would be dropped"),
    ],
)
def test_what_is_doubtful_is_named(tmp_path: Path, levels: np.ndarray, problem: str) -> None:
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "mask.png")

    assert problem in inspect_mask(tmp_path / "mask.png").problem


def test_a_picture_in_place_of_a_mask_is_named(tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(20, 236, LEVELS.shape).astype(np.uint8)
    Image.fromarray(np.dstack([np.maximum(gray, LEVELS), gray, gray])).save(tmp_path / "over.png")
    assert "an image in place of its mask?" in inspect_mask(tmp_path / "over.png").problem
    reading = MaskReading(threshold=240)
    assert inspect_mask(tmp_path / "over.png", reading=reading).problem == ""


def test_a_small_class_next_to_one_to_be_ignored_is_named(tmp_path: Path) -> None:
    labels = BLACK.copy()
    labels[0], labels[8, 8:10] = 255, 1
    Image.fromarray(labels).save(tmp_path / "classes.png")
    assert "values from 1 to 1 would be dropped" in inspect_mask(tmp_path / "classes.png").problem


def test_noise_of_compression_and_smoothed_outlines_are_no_doubt(tmp_path: Path) -> None:
    Image.fromarray(LEVELS).save(tmp_path / "mask.jpg", quality=80)
    smooth = Image.fromarray(LEVELS).resize((320, 240), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "smooth.png")
    Image.fromarray(BLACK).save(tmp_path / "empty.png")

    for name in ("mask.jpg", "smooth.png", "empty.png"):
        assert inspect_mask(tmp_path / name).problem == ""


def test_colors_against_alpha_are_refused(tmp_path: Path) -> None:
    other = np.roll(LEVELS, 12, axis=0)
    Image.fromarray(np.dstack([LEVELS, other])).save(tmp_path / "mask.png")

    with pytest.raises(AlmrrError, match=r"mask\.png.*different shapes"):
        read_mask(tmp_path / "mask.png")


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (MaskReading(threshold=0), CLASSES > 0),
        (MaskReading(threshold=150), CLASSES == 200),
        (MaskReading(values=(100,)), CLASSES == 100),
        (MaskReading(values=(100, 200)), CLASSES > 0),
        (MaskReading(values=(0,)), CLASSES == 0),
    ],
)
def test_the_settings_say_which_values_are_anomalous(
    tmp_path: Path, reading: MaskReading, expected: np.ndarray
) -> None:
    Image.fromarray(CLASSES).save(tmp_path / "mask.png")
    facts = inspect_mask(tmp_path / "mask.png", reading=reading)

    np.testing.assert_array_equal(facts.mask, expected)
    assert "dropped" not in facts.problem


@pytest.mark.parametrize("size", [(24, 32), (32, 24), (24, 31)])
def test_a_difference_of_size_is_explained_by_exif(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.fromarray(LEVELS).save(tmp_path / "mask.png")
    mask = inspect_mask(tmp_path / "mask.png")
    with_exif = explain_size(mask, size, image_turned=True)

    assert with_exif is not None
    assert ("EXIF turns the image" in with_exif) == (size != (24, 31))
    assert explain_size(mask, (24, 32)) is None
    assert "EXIF" not in str(explain_size(mask, (32, 24)))


def test_a_thin_scratch_keeps_its_length() -> None:
    mask = np.zeros((300, 4000), bool)
    mask[150:153, 100:3900] = True
    mask[10:12, 7:9] = True
    flipped = resize_mask(mask.T, (160, 160)).T

    for resized in (resize_mask(mask, (160, 160)), flipped):
        assert label(resized, np.ones((3, 3)))[1] == 2
        assert resized[75:85].any(axis=0).sum() == 152  # 3800 of 4000 columns
        assert resized[:10].sum() == 1


@given(st.integers(0, 10_000), st.integers(4, 40), st.integers(4, 40))
@settings(max_examples=60, deadline=None)
def test_no_region_is_lost_and_the_others_stay_as_they_were(
    seed: int, rows: int, columns: int
) -> None:
    generator = np.random.default_rng(seed)
    mask = generator.random((64, 90)) > 0.99
    mask[20:40, 30:60] = True
    resized = resize_mask(mask, (rows, columns))
    nearest = Image.fromarray(mask).resize((columns, rows), Image.Resampling.NEAREST)
    labels, count = label(mask, np.ones((3, 3)))

    assert not (np.asarray(nearest) & ~resized).any()
    for region in range(1, count + 1):
        at = np.nonzero(labels == region)
        near = {
            (row * rows // 64 + down, column * columns // 90 + right)
            for row, column in zip(*at, strict=True)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
        }
        assert any(
            0 <= row < rows and 0 <= column < columns and resized[row, column]
            for row, column in near
        )


def test_a_mask_whose_regions_all_survive_is_the_nearest_neighbor_to_the_bit() -> None:
    nearest = Image.fromarray(SHAPE).resize((17, 11), Image.Resampling.NEAREST)

    np.testing.assert_array_equal(resize_mask(SHAPE, (11, 17)), np.asarray(nearest))
