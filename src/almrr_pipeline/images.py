"""Pictures in, arrays out: every picture in this package is read and resized here, once and the same way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from almrr_pipeline.errors import AlmrrError

ImageArray = npt.NDArray[np.uint8]
"""RGB picture, uint8 in [0, 255], shape (H, W, 3)."""
MaskArray = npt.NDArray[np.bool_]
"""Ground truth, True where defective, shape (H, W)."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
_DEFECTIVE_ABOVE = 127
_DEEP_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})


def read_image(path: Path) -> ImageArray:
    """Read any picture as RGB.

    1-bit, 8-bit, 16-bit, palette, grey, alpha and CMYK pictures and EXIF orientations all end alike:
    alpha is dropped, 16-bit values are divided by 257 (65535 becomes 255), grey is repeated three times.

    Returns:
        uint8 in [0, 255], shape (H, W, 3).

    Raises:
        AlmrrError: the file is missing, empty, or not a picture that can be decoded.
    """
    with _opened(path) as picture:
        upright = ImageOps.exif_transpose(picture)
        return np.ascontiguousarray(np.asarray(_as_eight_bit(upright).convert("RGB")))


def read_mask(path: Path) -> MaskArray:
    """Read a ground truth mask: values above 127 of 255 are defective (the authors counted only 1.0 exactly).

    Returns:
        bool, shape (H, W).

    Raises:
        AlmrrError: the file is missing, empty, or not a picture that can be decoded.
    """
    with _opened(path) as picture:
        return np.asarray(_as_eight_bit(picture).convert("L")) > _DEFECTIVE_ABOVE


def resize_image(image: ImageArray, size: tuple[int, int]) -> ImageArray:
    """Resize to `size` = (rows, columns), bilinear and antialiased; uint8 (H, W, 3) in and out."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def resize_mask(mask: MaskArray, size: tuple[int, int]) -> MaskArray:
    """Resize to `size` = (rows, columns), nearest neighbour, so that a mask stays a mask; bool (H, W) in and out."""
    if mask.shape == tuple(size):
        return mask
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def _opened(path: Path) -> Image.Image:
    """Open and decode, turning every way Pillow has to fail into one sentence."""
    try:
        picture = Image.open(path)
        picture.load()
    except FileNotFoundError:
        raise AlmrrError(f"There is no picture at {path}; check the path.") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise AlmrrError(f"{path} cannot be read as a picture ({error}); replace or remove it.") from error
    return picture


def _as_eight_bit(picture: Image.Image) -> Image.Image:
    """Bring 16-bit and wider pictures to 8 bits by value; Pillow's own conversion would clip them."""
    if picture.mode not in _DEEP_MODES:
        return picture
    values = np.asarray(picture).astype(np.float64)
    if picture.mode == "F" and values.size and values.max() <= 1.0:
        values = values * 65535.0
    elif values.size and values.max() <= 255:
        values = values * 257.0
    return Image.fromarray(np.clip(np.rint(values / 257.0), 0, 255).astype(np.uint8))
