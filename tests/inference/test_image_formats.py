"""One image, saved in many ways, has one score, or is refused by name."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from almrr_pipeline import Predictor
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import (
    ImageFacts,
    Reading,
    decide_ranges,
    find_narrow_range,
    inspect_image,
    read_image,
)

GRAY = (
    (
        96
        + 60 * np.sin(np.arange(96)[:, None] / 5) * np.cos(np.arange(120) / 7)
        + np.random.default_rng(0).normal(0, 12, (96, 120))
    )
    .clip(0, 255)
    .astype(np.uint8)
)
GRAY[40:60, 30:70] = 255
GRAY[0, 0] = 0
RGB = np.dstack([GRAY] * 3)
DEEP = GRAY.astype(np.uint16) * 257
TWELVE = np.rint(GRAY * (4095 / 255)).astype(np.uint16)
FLOAT = (GRAY / 255).astype(np.float32)
TURNED = Image.fromarray(RGB[::-1].copy())
COLORS = np.tile(np.arange(256, dtype=np.uint16) * 257, (3, 1))


def _tiff(values: np.ndarray, **options: object) -> Callable[[Path], None]:
    return lambda path: tifffile.imwrite(path, values, **options)


def _pillow(values: np.ndarray, mode: str | None = None, **options: object) -> Callable:
    image = Image.fromarray(values)
    return lambda path: (image.convert(mode) if mode else image).save(path, **options)


def _planar(values: np.ndarray) -> Callable[[Path], None]:
    return _tiff(np.moveaxis(values, -1, 0), photometric="rgb", planarconfig="separate")


def _write(head: str, values: np.ndarray) -> Callable[[Path], object]:
    """Netpbm's formats: a line of text and the values."""
    return lambda path: path.write_bytes(f"{head}\n".encode() + values.tobytes())


def _png(bits: int, color: int, values: np.ndarray) -> Callable[[Path], object]:
    """PNG of 16 bits, which Pillow writes of gray alone; its chunks are few."""
    rows = values.astype(">u2" if bits == 16 else np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", *values.shape[1::-1], bits, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def _pages(path: Path, *pages: np.ndarray, preview: int) -> None:
    with tifffile.TiffWriter(path) as file:
        for number, values in enumerate(pages):
            file.write(values, subfiletype=int(number == preview))


def _packed_tiff(values: np.ndarray) -> bytes:
    """12 bits without gaps, which tifffile does not write."""
    bits = values[..., None] >> np.arange(11, -1, -1) & 1
    data = b"".join(np.packbits(row.astype(np.uint8)).tobytes() for row in bits)
    (rows, columns), place = values.shape, 8 + 2 + 12 * 8 + 4
    tags = {256: columns, 257: rows, 258: 12, 259: 1, 262: 1, 273: place, 278: rows, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def _over(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[5, 5] = 1.004
    return values


WAYS: dict[str, Callable[[Path], object]] = {
    "8_bits.png": _pillow(GRAY),
    "8_bits.tif": _tiff(GRAY),
    "color.png": _pillow(RGB),
    "alpha.png": _pillow(np.dstack([RGB, GRAY])),
    "gray_and_alpha.png": _pillow(np.dstack([GRAY, GRAY])),
    "palette.png": _pillow(GRAY, "P"),
    "cmyk.tif": _pillow(RGB, "CMYK"),
    "quality_95.jpg": _pillow(RGB, quality=95),
    "16_bits.png": _pillow(DEEP),
    "16_bits.tif": _tiff(DEEP),
    "16_bits_white_is_0.tif": _tiff(65535 - DEEP, photometric="miniswhite"),
    "8_bits_white_is_0.tif": _tiff(255 - GRAY, photometric="miniswhite"),
    "16_bits_planar.tif": _planar(np.dstack([DEEP] * 3)),
    "16_bits_color.tif": _tiff(np.dstack([DEEP] * 3), photometric="rgb", compression="zlib"),
    "16_bits_lzw.tif": _pillow(DEEP, compression="tiff_lzw"),
    "32_bits.tif": _tiff(GRAY.astype(np.uint32) * 16843009),
    "float_to_1.tif": _tiff(FLOAT),
    "float_to_255.tif": _tiff(GRAY.astype(np.float32)),
    "float_above_1.tif": _tiff(_over(FLOAT)),
    "float16.tif": _tiff(FLOAT.astype(np.float16)),
    "float64.tif": _tiff(FLOAT.astype(np.float64)),
    "float_color.tif": _tiff(np.dstack([FLOAT] * 3), photometric="rgb"),
    "8_bits_planar.tif": _planar(RGB),
    "16_bits_big_endian.tif": _tiff(DEEP, byteorder=">"),
    "16_bits_and_alpha.tif": _tiff(
        np.dstack([DEEP] * 4), photometric="rgb", extrasamples=["unassalpha"]
    ),
    "16_bits.pgm": _write("P5 120 96 65535", DEEP.astype(">u2")),
    "12_bits_declared.pgm": _write("P5 120 96 4095", TWELVE.astype(">u2")),
    "float_from_below.pfm": _write("Pf\n120 96\n-1.0", FLOAT[::-1].astype("<f4")),
    "cmyk.jpg": _pillow(RGB, "CMYK", quality=95),
    "lab.tif": _pillow(RGB, "LAB"),
    "16_bits.jp2": _pillow(DEEP),
    "color.tga": _pillow(RGB),
    "jpeg_named.png": _pillow(RGB, format="JPEG", quality=95),
    "phone.jpg": _pillow(RGB, format="MPO", save_all=True, append_images=[TURNED], quality=95),
    "16_bits_and_2.png": _png(16, 4, np.dstack([DEEP, DEEP[::-1]])),
    "thumbnail_first.tif": lambda path: _pages(path, DEEP[::4, ::4], DEEP, preview=0),
    "8_bits_thumbnail_first.tif": lambda path: _pages(path, GRAY[::4, ::4], GRAY, preview=0),
    "thumbnail_last.tif": lambda path: _pages(path, DEEP, DEEP[::4, ::4], preview=1),
    "signed_8_bits.tif": _tiff((GRAY.astype(np.int16) - 128).astype(np.int8)),
    "signed_16_bits.tif": _tiff(GRAY.astype(np.int16) * 128),
    "signed_below_0.tif": _tiff((DEEP.astype(np.int32) - 32768).astype(np.int16)),
    "palette_16_bits_each.tif": _tiff(GRAY, photometric="palette", colormap=COLORS),
    "cmyk_16_bits.tif": _tiff(np.dstack([65535 - DEEP] * 3 + [DEEP * 0]), photometric="separated"),
    "12_bits_packed.tif": lambda path: path.write_bytes(_packed_tiff(TWELVE)),
    "tiles.tif": _tiff(DEEP, tile=(32, 32), bigtiff=True),
    "opaque_16_bits.tif": _tiff(
        np.dstack([DEEP] * 3 + [DEEP * 0 + 65535]), photometric="rgb", extrasamples=["assocalpha"]
    ),
    "12_bits_declared.tif": _tiff(TWELVE, extratags=[(281, 3, 1, 4095, True)]),
}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "12_bits.tif": (_tiff(TWELVE), "holds uint16 values from 0 to 4095"),
    "12_bits.png": (_pillow(TWELVE), "holds uint16 values from 0 to 4095"),
    "negative.tif": (_tiff(GRAY.astype(np.int16) - 128), "holds int16 values from -128 to 127"),
    "five.tif": (
        _tiff(np.dstack([RGB, GRAY, GRAY]), photometric="rgb", planarconfig="contig"),
        "has 5 channels",
    ),
    "near_infrared.tif": (
        _tiff(np.dstack([DEEP] * 4), photometric="rgb", extrasamples=["unspecified"]),
        "has 4 channels",
    ),
    "pages.tif": (_tiff(np.stack([GRAY] * 3), photometric="minisblack"), "holds 3 images"),
    "stack.tif": (_tiff(np.stack([GRAY] * 3), imagej=True), "holds 3 images"),
    "animated.webp": (
        _pillow(RGB, save_all=True, append_images=[TURNED]),
        "holds 2 images",
    ),
    "animated.gif": (
        _pillow(RGB, save_all=True, append_images=[TURNED]),
        "holds 2 images",
    ),
    "animated.png": (
        _pillow(RGB, save_all=True, append_images=[TURNED]),
        "holds 2 images",
    ),
    "percent.tif": (_tiff(FLOAT * 100), "holds float32 values from 0 to 100"),
    "10_bits.tif": (_tiff(GRAY.astype(np.uint16) * 4), "holds uint16 values from 0 to 1020"),
    "14_bits.tif": (_tiff(GRAY.astype(np.uint16) * 64), "holds uint16 values from 0 to 16320"),
    "8_in_16_bits.tif": (_tiff(GRAY.astype(np.uint16)), "holds uint16 values from 0 to 255"),
    "uint64.tif": (_tiff(GRAY.astype(np.uint64) << 56), "holds uint64 values from 0 to 1.8"),
    "palette_of_16_bits.tif": (
        _tiff(DEEP, photometric="palette", colormap=np.zeros((3, 65536), np.uint16)),
        "a palette of 16 bits",
    ),
    "preview_alone.tif": (_tiff(DEEP, subfiletype=1), "holds a preview alone"),
    "multiplied.tif": (
        _tiff(np.dstack([DEEP] * 4), photometric="rgb", extrasamples=["assocalpha"]),
        "multiplied by their alpha",
    ),
    "complex.tif": (_tiff(GRAY.astype(np.complex64)), "complex64 values"),
    "not_finite.tif": (_tiff(np.where(GRAY > 250, np.nan, FLOAT)), "not finite"),
}


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    return Predictor(model_folder, device="cpu")


@pytest.fixture(scope="module")
def score(predictor: Predictor) -> float:
    return predictor([RGB])[0].score


@pytest.mark.parametrize("name", WAYS)
def test_an_image_has_one_score_however_it_is_saved(
    tmp_path: Path, predictor: Predictor, score: float, name: str
) -> None:
    WAYS[name](tmp_path / name)
    pixels = read_image(tmp_path / name).astype(int)

    assert predictor([tmp_path / name])[0].score == pytest.approx(score, abs=0.02)
    assert np.abs(pixels - RGB).mean() < 3  # the small network's score alone is a weak proof


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_certain_reading_is_refused_by_name(
    tmp_path: Path, predictor: Predictor, name: str
) -> None:
    save, said = REFUSED[name]
    save(tmp_path / name)

    with pytest.raises(AlmrrError, match=said) as caught:
        predictor([tmp_path / name])
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "ends"),
    [
        ("12_bits.tif", TWELVE, (0, 4095)),
        ("shifted.tif", (GRAY.astype(np.int16) - 128) * 250, (-32000, 31750)),
        ("large.tif", GRAY * 4000.0, (0, 1_020_000)),
    ],
)
def test_the_models_range_reads_what_is_uncertain_otherwise(
    tmp_path: Path,
    model_folder: Path,
    score: float,
    name: str,
    values: np.ndarray,
    ends: tuple[float, float],
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    described = json.loads((folder / "inference.json").read_text())
    described["reading"]["value_ranges"] = {values.dtype.name: ends}
    (folder / "inference.json").write_text(json.dumps(described))
    checksums = (folder / "model.sha256").read_text().splitlines(keepends=True)
    unlisted = [line for line in checksums if not line.endswith("inference.json\n")]
    (folder / "model.sha256").write_text("".join(unlisted))
    tifffile.imwrite(tmp_path / name, values)
    found = Predictor(folder, device="cpu")([tmp_path / name])

    assert found[0].score == pytest.approx(score, abs=0.02)


def test_16_bit_color_png_keeps_its_low_bits(tmp_path: Path) -> None:
    _png(16, 2, np.dstack([TWELVE] * 3))(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", Reading(value_ranges={"uint16": (0, 4095)}))
    np.testing.assert_array_equal(read, RGB)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "expected"),
    [
        ("uint16", 3, 250, (0, 255)),
        ("uint16", 3, 1000, (0, 1023)),
        ("uint16", 3, 4095, (0, 4095)),
        ("uint16", 3, 4096, (0, 16383)),
        ("uint16", 3, 65535, (0, 65535)),
        ("uint32", 0, 4e9, (0, 2**32 - 1)),
        ("int16", -1024, 3071, (-4096, 4095)),
        ("int16", -32768, 9, (-32768, 32767)),
        ("int16", 0, 20000, (0, 32767)),
        ("int8", -128, 127, (-128, 127)),
        ("float32", 0, 1.004, (0, 1)),
        ("float32", -0.01, 1.0, (0, 1)),
        ("float32", -1.0, 1.0, (-1, 1)),
        ("float64", 0, 255.4, (0, 255)),
        ("float64", 0, 4100.0, (0, 4095)),
    ],
)
def test_the_range_is_the_smallest_usual_one_that_holds_all(
    dtype: str, low: float, high: float, expected: tuple[float, float]
) -> None:
    darker = ImageFacts((1, 1), dtype, dtype, low=max(low, 0), high=high / 3)
    brightest = ImageFacts((1, 1), dtype, dtype, low=low, high=high)

    assert decide_ranges([darker, brightest, darker]) == {dtype: expected}
    assert decide_ranges([darker, brightest], (5, 9)) == {"any": (5, 9)}


def test_images_of_8_bits_need_no_range() -> None:
    assert decide_ranges([ImageFacts((1, 1), "L", "uint8", 0, 9)]) == {}


def test_values_beyond_32_bits_have_to_be_stated() -> None:
    with pytest.raises(AlmrrError, match=r"up to 1e\+20.*data\.value_range"):
        decide_ranges([ImageFacts((1, 1), "float32", "float32", 0, 1e20)])


def test_a_category_that_uses_little_of_its_range_is_named() -> None:
    dark = ImageFacts((1, 1), "L", "uint8", 3, 14)
    deep = ImageFacts((1, 1), "uint16", "uint16", 0, 300)

    assert "4.3%" in str(find_narrow_range([dark, dark], {}))
    assert find_narrow_range([dark, ImageFacts((1, 1), "L", "uint8", 40, 60)], {}) is None
    assert "0.5%" in str(find_narrow_range([deep], {"any": (0, 65535)}))
    assert find_narrow_range([deep], {"uint16": (0, 1023)}) is None


def test_another_encoding_than_the_models_is_refused_and_a_reflection_clipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reading = Reading(value_ranges={"uint16": (0, 4095)})
    bright = TWELVE.copy()
    bright[3, 4] = 5000
    tifffile.imwrite(tmp_path / "bright.tif", bright)
    tifffile.imwrite(tmp_path / "deep.tif", DEEP)

    assert (read_image(tmp_path / "bright.tif", reading)[3, 4] == 255).all()
    assert "bright.tif holds values from 0 to 5000" in caplog.text
    with pytest.raises(AlmrrError, match=r"deep\.tif holds values.*the range is 0 to 4095"):
        read_image(tmp_path / "deep.tif", reading)


def test_the_limit_is_ours_and_pillow_is_silent(tmp_path: Path) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    Image.new("1", (20_000, 10_000)).save(tmp_path / "wide.png")  # 200 megapixels
    Image.new("1", (11_000, 9_000)).save(tmp_path / "large.png")

    with pytest.raises(AlmrrError, match=r"20000 x 10000 pixels, more than 150 megapixels.*data\."):
        read_image(tmp_path / "wide.png", Reading(max_megapixels=150))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect_image(tmp_path / "large.png").size == (9_000, 11_000)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_facts_of_an_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(DEEP).save(tmp_path / "a.tif", exif=exif)
    facts = inspect_image(tmp_path / "a.tif")

    assert facts.size == (120, 96)
    assert (facts.mode, facts.bits, facts.turned) == ("uint16", 16, True)
    assert (facts.low, facts.high) == (0, 65535)
