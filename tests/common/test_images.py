"""Every kind of image ends as the same RGB, and a mask stays a mask."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import (
    Reading,
    decode_image,
    read_image,
    resize_image,
)
from almrr_pipeline.common.masks import read_mask, resize_mask

GRAY = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)
COLOR = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def as_rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_rgb_is_read_as_it_was_saved(tmp_path: Path, suffix: str) -> None:
    path = save(
        Image.fromarray(COLOR),
        tmp_path / f"a.{suffix}",
        **({"lossless": True} if suffix == "webp" else {}),
    )

    np.testing.assert_array_equal(read_image(path), COLOR)


def test_a_drawing_is_not_handed_to_another_program(tmp_path: Path) -> None:
    path = save(Image.fromarray(COLOR), tmp_path / "a.eps")

    with pytest.raises(AlmrrError, match=r"a\.eps is a drawing, .* save it as PNG\."):
        read_image(path)


def test_gray_is_repeated_three_times(tmp_path: Path) -> None:
    np.testing.assert_array_equal(
        read_image(save(Image.fromarray(GRAY), tmp_path / "a.png")), as_rgb(GRAY)
    )


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    bits = GRAY % 3 == 0

    np.testing.assert_array_equal(
        read_image(save(Image.fromarray(bits), tmp_path / "a.png")),
        as_rgb(bits.astype(np.uint8) * 255),
    )


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_is_divided_by_257(tmp_path: Path, suffix: str) -> None:
    deep = GRAY.astype(np.uint16) * 257

    np.testing.assert_array_equal(
        read_image(save(Image.fromarray(deep), tmp_path / f"a.{suffix}")), as_rgb(GRAY)
    )


def test_a_dark_sixteen_bit_image_stays_dark(tmp_path: Path) -> None:
    dark = np.full((12, 20), 200, dtype=np.uint16)

    path = save(Image.fromarray(dark), tmp_path / "a.png")
    reading = Reading(value_ranges={"uint16": (0, 65535)})

    assert read_image(path, reading).max() == 1
    with pytest.raises(AlmrrError, match=r"a\.png holds uint16 values from 200 to 200"):
        read_image(path)  # it may be of 8, 10, 12, 14 or 16 bits


def test_big_endian_sixteen_bit_is_read_by_value(tmp_path: Path) -> None:
    deep = Image.frombytes("I;16B", (20, 12), (GRAY.astype(">u2") * 257).tobytes())

    np.testing.assert_array_equal(read_image(save(deep, tmp_path / "a.tif")), as_rgb(GRAY))


def test_thirty_two_bit_integers_are_taken_for_sixteen_bit(tmp_path: Path) -> None:
    deep = Image.fromarray(GRAY.astype(np.int32) * 257)

    np.testing.assert_array_equal(read_image(save(deep, tmp_path / "a.tif")), as_rgb(GRAY))


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_fractional_numbers_are_scaled_by_what_they_reach(tmp_path: Path, white: float) -> None:
    image = Image.fromarray((GRAY / 239 * white).astype(np.float32))
    expected = np.rint(GRAY / 239 * 255).astype(np.uint8)

    np.testing.assert_allclose(
        read_image(save(image, tmp_path / "a.tif")), as_rgb(expected), atol=1
    )


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), tmp_path / "a.tif")

    with pytest.raises(AlmrrError, match=r"a\.tif.*not finite"):
        read_image(path)


@pytest.mark.parametrize("transparency", [False, True])
def test_palette_is_looked_up(tmp_path: Path, transparency: bool) -> None:
    palette = Image.fromarray(COLOR).quantize(16)
    options = {"transparency": bytes(range(0, 256, 16))} if transparency else {}

    path = save(palette, tmp_path / "a.png", **options)

    np.testing.assert_array_equal(read_image(path), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_not_blended(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(COLOR).convert(mode)
    image.putalpha(Image.fromarray(GRAY))

    expected = COLOR if mode == "RGBA" else as_rgb(np.asarray(Image.fromarray(COLOR).convert("L")))
    np.testing.assert_array_equal(read_image(save(image, tmp_path / "a.png")), expected)


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk_becomes_rgb(tmp_path: Path, suffix: str) -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    path = save(
        red.convert("CMYK"),
        tmp_path / f"a.{suffix}",
        **({"quality": 100} if suffix == "jpg" else {}),
    )

    np.testing.assert_allclose(read_image(path), np.asarray(red), atol=3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_turned_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :16] = (255, 0, 0)
    upright[16:, 32:] = (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 95, "subsampling": 0}}.get(
        suffix, {}
    )
    path = save(
        Image.fromarray(np.ascontiguousarray(stored)),
        tmp_path / f"a.{suffix}",
        exif=exif,
        **lossless,
    )

    np.testing.assert_allclose(read_image(path), upright, atol=8)


@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"})]
)
def test_a_sixteen_bit_image_is_turned_upright_too(
    tmp_path: Path, suffix: str, options: dict[str, str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.ascontiguousarray(np.rot90(GRAY)).astype(np.uint16) * 257
    path = save(Image.fromarray(stored), tmp_path / f"a.{suffix}", exif=exif, **options)

    np.testing.assert_array_equal(read_image(path), as_rgb(GRAY))


def test_the_array_may_be_written_to(tmp_path: Path) -> None:
    assert read_image(save(Image.fromarray(COLOR), tmp_path / "a.png")).flags.writeable


def test_the_file_is_closed_again(tmp_path: Path) -> None:
    path = save(Image.fromarray(COLOR), tmp_path / "a.tif")

    np.testing.assert_array_equal(read_image(path), COLOR)
    path.unlink()  # fails on Windows while somebody has it open


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty file"), (b"hello", "not an image"), (b"\x89PNG\r\n\x1a\n", "cannot be read")],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a b é.png"
    path.write_bytes(content)

    with pytest.raises(AlmrrError, match=said) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_a_missing_image_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match="There is no image"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(AlmrrError, match="cannot be read"):
        read_image(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(Image.fromarray(noise), tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(AlmrrError, match="cannot be read as an image"):
        read_image(path)


def test_a_mask_counts_values_above_127(tmp_path: Path) -> None:
    np.testing.assert_array_equal(
        read_mask(save(Image.fromarray(GRAY), tmp_path / "a.png")), GRAY > 127
    )


@pytest.mark.parametrize("factor", [1, 257])
def test_a_sixteen_bit_mask_may_hold_eight_bit_values(tmp_path: Path, factor: int) -> None:
    mask = (GRAY > 100) * np.uint16(255 * factor)

    np.testing.assert_array_equal(
        read_mask(save(Image.fromarray(mask), tmp_path / "a.png")), GRAY > 100
    )


def test_a_palette_mask_is_read_by_brightness(tmp_path: Path) -> None:
    mask = Image.fromarray((GRAY > 100).astype(np.uint8)).convert("P")
    mask.putpalette([0, 0, 0, 255, 255, 255])

    np.testing.assert_array_equal(read_mask(save(mask, tmp_path / "a.png")), GRAY > 100)


def test_resizing_gives_rows_and_columns_and_keeps_a_mask_boolean() -> None:
    mask = resize_mask(GRAY > 100, (6, 40))

    assert resize_image(COLOR, (6, 40)).shape == (6, 40, 3)
    assert mask.shape == (6, 40)
    assert mask.dtype == np.bool_
    assert resize_image(COLOR, (12, 20)) is COLOR


def test_doubling_a_mask_repeats_its_pixels() -> None:
    mask = GRAY % 5 == 0

    np.testing.assert_array_equal(
        resize_mask(mask, (24, 40)), mask.repeat(2, axis=0).repeat(2, axis=1)
    )


FORMATS = {
    "PNG": ["1", "L", "LA", "I;16", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "I;16", "I", "F", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"],
    "JPEG": ["L", "RGB", "CMYK", "YCbCr"],
    "BMP": ["1", "L", "P", "RGB"],
    "WEBP": ["RGB", "RGBA"],
}


@st.composite
def images(draw: st.DrawFn) -> tuple[bytes, tuple[int, int]]:
    """An image file of any format, mode and size, and what size it has."""
    kind = draw(st.sampled_from(sorted(FORMATS)))
    mode = draw(st.sampled_from(FORMATS[kind]))
    width, height = draw(st.integers(1, 33)), draw(st.integers(1, 33))
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(
        0, 256, (height, width), dtype=np.uint8
    )
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    elif mode == "LAB":
        image = Image.merge("LAB", [Image.fromarray(values)] * 3)
    else:
        image = Image.fromarray(values).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue(), (height, width)


@given(images())
@settings(max_examples=120, deadline=None)
def test_any_mode_and_size_is_rgb_of_its_size(image: tuple[bytes, tuple[int, int]]) -> None:
    data, size = image
    image = decode_image(data, Path("a.image"), Reading(value_ranges={"any": (0, 65535)}))
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8


@given(images(), st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells what is damaged
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_bytes_end_in_an_image_or_a_clear_error(
    image: tuple[bytes, tuple[int, int]], data: st.DataObject
) -> None:
    damaged = bytearray(image[0])
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    try:
        image = decode_image(bytes(damaged[:cut]), Path("a.image"))
    except AlmrrError as error:
        assert "a.image" in str(error)  # noqa: PT017 (both ends are allowed)
        return
    assert image.ndim == 3


def test_a_large_image_is_mapped_from_a_file_and_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(70, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.png")
    monkeypatch.setattr("almrr_pipeline.common.arrays._LARGE", 100)
    monkeypatch.setattr("almrr_pipeline.common.images._STRIP", 16)
    found = read_image(tmp_path / "a.png")
    assert isinstance(found.base, np.memmap)
    assert found.flags.writeable
    np.testing.assert_array_equal(found, pixels)
    gray = pixels[..., :1].repeat(3, axis=2)
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png"), gray)
