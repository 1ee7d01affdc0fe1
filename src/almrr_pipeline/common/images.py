"""Reading and resizing of images, the only place where either is done; anomaly maps as PNG.

Images of 8 bits are taken as they are. For deeper ones `Reading` holds which values are black and
white, decided once for a category (`decide_ranges`) and stored with its model.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from almrr_pipeline.common.arrays import (
    AnomalyMap,
    ImageArray,
    allocate,
    release_pages,
    return_free_memory,
)
from almrr_pipeline.common.decoding import Stored, decode
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import escape_name, escape_text, walk

logger = logging.getLogger(__name__)

_SUFFIXES = "png jpg jpeg jpe jfif jp2 bmp dib gif tif tiff webp tga pbm pgm pnm ppm"
IMAGE_SUFFIXES = frozenset(f".{each}" for each in _SUFFIXES.split())
"""Of all that is read, by every command and stage; a file that is named itself may have others."""
ValueRange = tuple[float, float]
"""The values that are black and white; black is the smaller one."""
EIGHT_BITS: ValueRange = (0.0, 255.0)
_DEPTHS = (8, 10, 12, 14, 16, 20, 24, 28, 32)  # of cameras and of number types, in bits
_STRIP = 512  # rows that are converted at a time
_TOLERANCE = 0.05  # of a range, by which interpolation and single pixels leave it
_BEYOND = 0.01  # fraction of values beyond a range that is no longer a few reflections
_PERCENT = 100 * (1 + _TOLERANCE)  # numbers with a fraction up to it are percent, or dark
_LITTLE = 1 / 16  # of a range: what 8 bits keep of it is fewer than 16 values


class Reading(BaseModel):
    """How image files become 8-bit RGB."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # by the type of the values, such as uint16; "any" for all of more than 8 bits
    value_ranges: dict[str, ValueRange] = {}
    max_megapixels: float = Field(default=500.0, gt=0.0)  # 1.5 GB as RGB

    def range_of(self, dtype: str) -> ValueRange | None:
        """Black and white of a type; None where only the file itself can tell."""
        if dtype == "uint8":
            return EIGHT_BITS
        return self.value_ranges.get(dtype) or self.value_ranges.get("any")


@dataclass(frozen=True)
class ImageFacts:
    """What an image file holds."""

    size: tuple[int, int]  # rows and columns, upright
    mode: str  # Pillow's (L, RGB, P, ...) or, of more than 8 bits, type and channels: uint16 x 3
    dtype: str  # uint8 for everything of 8 bits or less
    low: float  # smallest and largest value, as stored
    high: float
    white: float | None = None  # largest possible value, where the file declares it
    turned: bool = False  # EXIF turned it upright

    @property
    def bits(self) -> int:
        """Bits of a value, as the type has them."""
        return 8 * np.dtype(self.dtype).itemsize


def list_images(
    folder: Path,
    suffixes: Iterable[str] = IMAGE_SUFFIXES,
    *,
    recursive: bool = False,
    others: Counter[str] | None = None,
) -> list[Path]:
    """Return the images in `folder`, sorted by path, as `walk` lists them: links are followed.

    Links to nothing are logged; all other files are counted in `others`, by suffix.
    """
    wanted = {suffix.lower() for suffix in suffixes}
    if not folder.is_dir():
        return []
    entries = list(walk(folder, recursive=recursive))
    for entry in entries:
        if entry.is_loss:
            logger.warning("%s is left out: %s", escape_name(entry.path), entry.skipped)
    files = [entry.path for entry in entries if not entry.skipped]
    if others is not None:
        others.update(path.suffix.lower() for path in files)
        for suffix in wanted:
            del others[suffix]
    return sorted(path for path in files if path.suffix.lower() in wanted)


def report_others(others: Counter[str]) -> None:
    """Log, in one sentence, how many files `list_images` did not take, by suffix."""
    if not others:
        return
    counted = others.most_common()
    named = ", ".join(f"{count} {suffix or 'without one'}" for suffix, count in counted)
    logger.warning(
        "%d files do not have the suffix of an image and were not taken: %s; accepted are %s.",
        others.total(),
        escape_text(named),
        ", ".join(sorted(IMAGE_SUFFIXES)),
    )


def read_image(path: Path, reading: Reading | None = None) -> ImageArray:
    """Read any image as RGB.

    EXIF orientation is applied and alpha dropped; palettes and CMYK are converted, and gray is
    repeated three times. Deeper values than 8 bits are scaled from the range that `reading` holds
    for their type; without one, from the range that the image alone makes certain.

    Returns:
        uint8 in [0, 255], shape (H, W, 3), upright, writable.

    Raises:
        AlmrrError: the file is missing, empty, not an image that can be decoded, of several pages,
            or too large; or its range is uncertain, or another than `reading` holds.
    """
    pixels = decode_image(read_bytes(path), path, reading)
    return_free_memory(pixels)  # of a decoded image's blocks malloc keeps nearly all
    return pixels


def decode_image(data: bytes, path: Path, reading: Reading | None = None) -> ImageArray:
    """Decode an image file's bytes as `read_image` does; `path` only names it in an error."""
    reading = reading or Reading()
    return _as_rgb(decode(data, path, max_megapixels=reading.max_megapixels), path, reading)


def inspect_image(path: Path, reading: Reading | None = None) -> ImageFacts:
    """Read what an image file holds; raises as `read_image`, but for the range of its values."""
    return inspect_bytes(read_bytes(path), path, reading)[0]


def inspect_bytes(
    data: bytes, path: Path, reading: Reading | None = None
) -> tuple[ImageFacts, ImageArray]:
    """The facts of an image file's bytes, and its pixels as RGB.

    Pixels of more than 8 bits are scaled from the smallest depth that holds them: good for a look
    and for comparing images, not for a network.
    """
    reading = reading or Reading()
    stored = decode(data, path, max_megapixels=reading.max_megapixels)
    values = _as_rgb(stored, path, reading) if stored.values is None else stored.values
    facts = ImageFacts(
        size=stored.size,
        mode=stored.mode,
        dtype=values.dtype.name,
        low=float(values.min()),
        high=float(values.max()),
        white=stored.white,
        turned=stored.turned,
    )
    if stored.values is None:
        return facts, values
    ends = reading.range_of(facts.dtype) or _smallest_range([facts])
    if ends is None:
        raise _unknown_range(path, facts)
    return facts, _scale(stored, ends)


def decide_ranges(
    images: Iterable[ImageFacts], stated: ValueRange | None = None
) -> dict[str, ValueRange]:
    """Decide once, from a category's normal training images, which values are black and white.

    Integers are taken for the smallest of 8, 10, 12, 14, 16, ... bits that holds all of them, or
    for the depth that a file declares; numbers with a fraction for [0, 1] if none is above 2, else
    for integers. Where values are negative, the range is that of signed integers, or [-1, 1].

    Args:
        images: facts of all normal training images, validation included; no test image.
        stated: the range by `data.value_range`, which then holds for all that is not of 8 bits.

    Returns:
        The range by the type of the values, for `Reading.value_ranges`; empty for 8 bits alone.

    Raises:
        AlmrrError: values are beyond 32 bits.
    """
    of_type: dict[str, list[ImageFacts]] = {}
    for facts in images:
        of_type.setdefault(facts.dtype, []).append(facts)
    of_type.pop("uint8", None)
    if stated is not None:
        return {"any": stated}
    ranges = {}
    for dtype, same_type in sorted(of_type.items()):
        ends = _smallest_range(same_type)
        if ends is None:
            high = max(facts.high for facts in same_type)
            raise AlmrrError(
                f"The training images hold {dtype} values up to {high:g}; state which values are "
                "black and white in data.value_range."
            )
        ranges[dtype] = ends
    return ranges


def find_narrow_range(
    images: Iterable[ImageFacts], value_ranges: Mapping[str, ValueRange]
) -> str | None:
    """Return a sentence if the images use less than a sixteenth of their range, else None."""
    reading = Reading(value_ranges=dict(value_ranges))
    used = [
        ((facts.low - ends[0]) / (ends[1] - ends[0]), (facts.high - ends[0]) / (ends[1] - ends[0]))
        for facts in images
        if (ends := reading.range_of(facts.dtype)) is not None
    ]
    if not used:
        return None
    low, high = min(low for low, _ in used), max(high for _, high in used)
    if high - low >= _LITTLE:
        return None
    return (
        f"the normal images use {high - low:.1%} of the range of their values, so little that "
        "8 bits lose their texture; expose them longer, or state the range in data.value_range"
    )


def resize_image(image: ImageArray, size: tuple[int, int]) -> ImageArray:
    """Resize to `size` = (rows, columns), bilinear and antialiased; uint8 (H, W, 3) in and out."""
    if image.shape[:2] == tuple(size):
        return image
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def encode_map(anomaly_map: AnomalyMap) -> bytes:
    """Encode an anomaly map, float32 (H, W) in [0, 1], as 16-bit gray PNG, 65535 for 1."""
    gray = np.rint(anomaly_map * np.float32(65535)).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(gray).save(stream, format="PNG")
    return stream.getvalue()


def read_bytes(path: Path, *, name: Path | None = None) -> bytes:
    """Read a file; AlmrrError, with `name` instead of the path, if that is not possible."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise AlmrrError(f"There is no image at {name or path}; check the path.") from None
    except OSError as error:
        message = f"{name or path} cannot be read ({error.strerror}); check its permissions."
        raise AlmrrError(message) from error


def _as_rgb(stored: Stored, path: Path, reading: Reading) -> ImageArray:
    if stored.image is not None:
        stored.image.info.pop("transparency", None)  # alpha is dropped; Pillow would warn of it
        return _to_array(stored.image)
    values = stored.values
    assert values is not None
    low, high = float(values.min()), float(values.max())
    dtype = values.dtype.name
    facts = ImageFacts(stored.size, stored.mode, dtype, low, high, stored.white)
    ends = reading.range_of(dtype)
    if ends is None:
        ends = _certain_range(facts)
        if ends is None:
            raise _unknown_range(path, facts)
        return _scale(stored, ends)
    slack = _TOLERANCE * (ends[1] - ends[0])
    if low < ends[0] - slack or high > ends[1] + slack:
        beyond = float(np.mean((values < ends[0] - slack) | (values > ends[1] + slack)))
        said = f"holds values from {low:g} to {high:g}, the range is {ends[0]:g} to {ends[1]:g}"
        if beyond > _BEYOND:
            raise AlmrrError(f"{path} {said}; save it as the training images, or train anew.")
        logger.warning(
            "%s %s: %.2g %% of its values are clipped.", escape_text(str(path)), said, 100 * beyond
        )
    return _scale(stored, ends)


def _to_array(image: Image.Image) -> ImageArray:
    """8-bit RGB (H, W, 3), strip by strip: Pillow would copy the image twice or thrice."""
    pixels: ImageArray = allocate((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        pixels[top : top + _STRIP] = np.asarray(
            strip if strip.mode == "RGB" else strip.convert("RGB")
        )
        release_pages(pixels)
    return pixels


def _scale(stored: Stored, ends: ValueRange) -> ImageArray:
    """Scale to 8-bit RGB; black and white change places where 0 is white."""
    low, high = ends
    values = np.asarray(stored.values, dtype=np.float64)
    gray = np.clip(np.rint((values - low) * (255 / (high - low))), 0, 255).astype(np.uint8)
    if stored.white_is_0:
        gray = 255 - gray
    return gray.copy() if gray.ndim == 3 else np.repeat(gray[..., None], 3, axis=2)


def _smallest_range(images: Iterable[ImageFacts]) -> ValueRange | None:
    """The smallest usual range that holds the values of images of one type; None beyond 32 bits."""
    images = list(images)
    low, high = min(one.low for one in images), max(one.high for one in images)
    declared = [one.white for one in images if one.white is not None]
    if len(declared) == len(images) and low >= 0:
        return 0.0, max(declared)
    is_float = images[0].dtype.startswith("float")
    largest = max(high, -low if is_float else -low - 1)
    slack = 1 + _TOLERANCE if is_float else 1.0
    negative = low < -_TOLERANCE * largest if is_float else low < 0
    if is_float and largest <= 2:  # 255 cannot be white: all would be black
        return (-1.0, 1.0) if negative else (0.0, 1.0)
    for bits in _DEPTHS:
        white = min(2.0**bits - 1, _largest(images[0].dtype))
        if largest <= white * slack:
            return (-white - 1, white) if negative else (0.0, white)
    return None


def _largest(dtype: str) -> float:
    return float(np.iinfo(dtype).max) if np.dtype(dtype).kind in "iu" else np.inf


def _certain_range(facts: ImageFacts) -> ValueRange | None:
    """The range that an image alone makes certain: no smaller depth holds it, or it is declared."""
    ends = _smallest_range([facts])
    if ends is None or facts.white is not None or facts.high == facts.low == 0:
        return ends
    if facts.dtype.startswith("float"):
        if ends[1] == 255 and facts.high <= _PERCENT:
            return None
        return ends if ends[1] in (1.0, 255.0, 65535.0) else None
    whole = _largest(facts.dtype)
    # cameras of 14 bits are common, between 14 bits and the 16 of files there are none; files of
    # 32-bit integers hold the values of 16-bit files
    return ends if ends[1] in (65535.0, whole) else None


def _unknown_range(path: Path, facts: ImageFacts) -> AlmrrError:
    return AlmrrError(
        f"{path} holds {facts.dtype} values from {facts.low:g} to {facts.high:g}, and which ones "
        "are black and white cannot be told from one image; state them in data.value_range before "
        "the training, or by --value-range, which `almrr calibrate` stores with the model."
    )
