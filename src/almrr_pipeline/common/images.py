"""Reading and resizing of images and masks, the only place where either is done; maps as PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from almrr_pipeline.common.arrays import AnomalyMap, ImageArray, MaskArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import walk

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
_ANOMALOUS_ABOVE = 127
"""Half of white: lossy compression and resizing leave values between 0 and 255."""
_WHITE_OF_16_BITS = 65535.0  # 257 times the white of 8 bits


def list_images(
    folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES, *, recursive: bool = False
) -> list[Path]:
    """Return the images in `folder`, sorted by path, as `walk` lists them: links are followed."""
    wanted = {suffix.lower() for suffix in suffixes}
    if not folder.is_dir():
        return []
    entries = walk(folder, recursive=recursive)
    return sorted(e.path for e in entries if not e.skipped and e.path.suffix.lower() in wanted)


def read_image(path: Path) -> ImageArray:
    """Read any image as RGB.

    EXIF orientation is applied and alpha dropped; palettes and CMYK are converted, and gray is
    repeated three times. Integers deeper than 8 bits are divided by 257 (65535 becomes 255). The
    range of floating-point values is taken from their maximum: [0, 1], 8 bits or 16 bits.

    Returns:
        uint8 in [0, 255], shape (H, W, 3), upright, writable.

    Raises:
        AlmrrError: the file is missing, empty, or not an image that can be decoded.
    """
    return decode_image(read_bytes(path), path)


def decode_image(data: bytes, path: Path) -> ImageArray:
    """Decode an image file's bytes as `read_image` does; `path` only names it in an error."""
    return np.array(_decoded(data, path, mode="RGB"))


def read_mask(path: Path, *, name: Path | None = None) -> MaskArray:
    """Read a ground truth mask; values above 127 of 255 are anomalous.

    The authors' code counted 255 alone. A mask of 16 bits or more without values above 255 is taken
    for an 8-bit one, because many tools save masks so. Raises as `read_image`; errors show `name`
    instead of the path.

    Returns:
        bool, shape (H, W), upright.
    """
    gray = _decoded(read_bytes(path, name=name), name or path, mode="L")
    return np.array(gray) > _ANOMALOUS_ABOVE


def resize_image(image: ImageArray, size: tuple[int, int]) -> ImageArray:
    """Resize to `size` = (rows, columns), bilinear and antialiased; uint8 (H, W, 3) in and out."""
    if image.shape[:2] == tuple(size):
        return image
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def resize_mask(mask: MaskArray, size: tuple[int, int]) -> MaskArray:
    """Resize to `size` = (rows, columns), nearest neighbor; bool (H, W) in and out."""
    if mask.shape == tuple(size):
        return mask
    return np.array(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


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


def _decoded(data: bytes, path: Path, *, mode: str) -> Image.Image:
    """Decode, turn upright and convert; all of Pillow's errors become AlmrrError."""
    if not data:
        raise AlmrrError(f"{path} is an empty file, not an image; replace or remove it.")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            upright = _as_eight_bit(ImageOps.exif_transpose(image), is_mask=mode == "L")
            upright.info.pop("transparency", None)  # alpha is dropped; Pillow would warn of it
            return upright.convert(mode)
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = str(error) or type(error).__name__
        if "cannot identify" in reason:
            reason = "it is not an image"
        message = f"{path} cannot be read as an image ({reason}); replace or remove it."
        raise AlmrrError(message) from error


def _as_eight_bit(image: Image.Image, *, is_mask: bool) -> Image.Image:
    """Scale deeper images to 8 bits; Pillow's own conversion would clip them."""
    if image.mode not in {"I", "F"} and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    white = _WHITE_OF_16_BITS
    if image.mode == "F" and values.max() <= 1.0:
        white = 1.0
    elif (image.mode == "F" or is_mask) and values.max() <= 255:
        white = 255.0
    return Image.fromarray(np.clip(np.rint(values * (255 / white)), 0, 255).astype(np.uint8))
