"""Image files as they store their values, upright: Pillow, and others where Pillow loses bits.

Pillow cuts 16-bit color to 8 bits, ignores "0 is white" in deep TIFF files, and does not read
float16, float64, float color or five channels. Such TIFF files are read by tifffile, and 16-bit
color PNG files by torchvision.
"""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, ImageOps

from almrr_pipeline.common.errors import AlmrrError, quote

_OPENING = threading.Lock()
_ORIENTATION = 0x0112  # tag of EXIF and TIFF
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG\r\n\x1a\n"
_SINGLE = frozenset({"MPO", "PSD", "TIFF"})
"""Formats whose first image counts: a phone's JPEG has previews behind it, PSD its layers."""
_DRAWINGS = frozenset({"EPS", "WMF"})  # Pillow hands them to Ghostscript, or to Windows
_LOSSY = frozenset({"JPEG", "JPEG2000", "MPO", "WEBP"})
_ASSOCIATED = 1  # TIFF's extra sample: alpha that colors are multiplied by
_BLACK_IS_0, _WHITE_IS_0, _RGB, _SEPARATED = 1, 0, 2, 5  # TIFF's photometric interpretations
_PHOTOMETRIC = {3: "a palette", 6: "YCbCr colors", 8: "CIELAB colors", 32803: "raw sensor values"}


@dataclass(frozen=True)
class Stored:
    """An image as stored, upright: of 8 bits or less by Pillow, deeper ones as an array."""

    image: Image.Image | None  # of 8 bits per channel or less
    values: npt.NDArray[Any] | None  # deeper ones, shape (H, W) or (H, W, 3)
    mode: str  # Pillow's, or type and channels: "uint16 x 3"
    white_is_0: bool = False
    white: float | None = None  # largest value, where the file declares it
    is_lossy: bool = False
    turned: bool = False  # by EXIF

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns, upright."""
        if self.values is not None:
            return self.values.shape[0], self.values.shape[1]
        assert self.image is not None
        return self.image.height, self.image.width


def decode(data: bytes, path: Path, *, max_megapixels: float) -> Stored:
    """Decode an image file's bytes; `path` names it in errors.

    Raises:
        AlmrrError: it is empty, no image, damaged, larger than `max_megapixels`, of several pages,
            or stores values in a way that has no certain reading.
    """
    if not data:
        raise AlmrrError(f"{path} is an empty file, not an image; replace or remove it.")
    try:
        return _decode(data, max_megapixels)
    except _UnreadableError as error:
        raise AlmrrError(f"{path} {error}.") from None
    except Exception as error:  # a damaged file makes decoders raise nearly anything
        reason = quote(error) or type(error).__name__
        if "cannot identify" in reason:
            reason = "it is not an image"
        message = f"{path} cannot be read as an image ({reason}); replace or remove it."
        raise AlmrrError(message) from error


class _UnreadableError(Exception):
    """What an image is and what to do, as the rest of a sentence that begins with its name."""


def _decode(data: bytes, max_megapixels: float) -> Stored:
    number = 0
    if data[:4] in _TIFF:
        found = _decode_deep_tiff(data, max_megapixels)
        if isinstance(found, Stored):
            return found
        number = found
    with _open(data) as image:
        if number:
            image.seek(number)
        _check_size(image.height, image.width, max_megapixels)
        if image.format not in _SINGLE:
            _check_pages(getattr(image, "n_frames", 1))
        if image.format in _DRAWINGS:
            raise _UnreadableError("is a drawing, which another program would draw; save it as PNG")
        orientation = image.getexif().get(_ORIENTATION, 1)
        turned, lossy = orientation in range(2, 9), image.format in _LOSSY
        if data.startswith(_PNG) and data[24] == 16 and data[25] != 0:  # depth and color of IHDR
            values = _decode_deep_png(data)
            return _deep(_turn(values, orientation), turned=turned)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # which else copies an upright image too
        upright: Image.Image = image
        if upright.mode in {"I", "F"} or upright.mode.startswith("I;16"):
            stretched = image.format == "PPM" and upright.mode != "F"  # by Pillow, to 16 bits
            white = 65535.0 if stretched else None
            return _deep(np.asarray(upright), white=white, turned=turned)
        return Stored(upright, None, image.mode, is_lossy=lossy, turned=turned)


def _open(data: bytes) -> Image.Image:
    """Open without Pillow's own limit on the size, which is a setting of the whole process."""
    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data))
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _deep(
    values: npt.NDArray[Any],
    *,
    turned: bool,
    white: float | None = None,
    white_is_0: bool = False,
) -> Stored:
    if values.ndim == 3 and values.shape[2] in {2, 4}:  # alpha is dropped, as of 8 bits
        values = values[..., : values.shape[2] - 1]
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    channels = " x 3" if values.ndim == 3 else ""
    return Stored(None, values, f"{values.dtype}{channels}", white_is_0, white, turned=turned)


def _decode_deep_png(data: bytes) -> npt.NDArray[Any]:
    import torch  # seconds, for a rare kind of file
    from torchvision.io import ImageReadMode, decode_png

    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    decoded = decode_png(buffer, ImageReadMode.UNCHANGED)  # (C, H, W)
    return np.asarray(decoded.permute(1, 2, 0).numpy())


def _decode_deep_tiff(data: bytes, max_megapixels: float) -> Stored | int:
    """Decode a TIFF file of more than 8 bits; of others give the number of the page for Pillow."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = [number for number, page in enumerate(file.pages) if not _is_preview(page)]
        if not pages:
            raise _UnreadableError("holds a preview alone; save the image itself as its first page")
        page = file.pages[pages[0]].aspage()
        virtual = (file.imagej_metadata or {}).get("images", 1)  # pages without a header
        _check_size(page.imagelength, page.imagewidth, max_megapixels)
        _check_pages(max(len(pages), int(virtual)))
        samples, photometric = page.samplesperpixel, int(page.photometric)
        extra = samples - {_RGB: 3, _SEPARATED: 4}.get(photometric, 3 if samples == 3 else 1)
        if extra > 1 or (extra == 1 and page.dtype != np.uint8 and not any(page.extrasamples)):
            raise _UnreadableError(
                f"has {samples} channels, of which some are not declared as color or alpha; save "
                "the three that show defects best as RGB"
            )
        shallow = page.dtype is not None and page.dtype in (np.dtype(np.uint8), np.dtype(bool))
        if shallow or photometric == _SEPARATED:
            return pages[0]
        if photometric not in (_BLACK_IS_0, _WHITE_IS_0, _RGB):
            kind = _PHOTOMETRIC.get(photometric, f"photometric interpretation {photometric}")
            raise _UnreadableError(f"holds {kind} of {page.bitspersample} bits; save it as RGB")
        if np.dtype(page.dtype or np.uint16).kind not in "uif":
            raise _UnreadableError(f"holds {page.dtype} values; save real numbers")
        tag = page.tags.get(_ORIENTATION)
        orientation = int(tag.value) if tag else 1
        values = _read_page(page, data, pages[0], orientation)
        if _ASSOCIATED in page.extrasamples and values[..., -1].min() < _full(values.dtype):
            raise _UnreadableError("holds colors multiplied by their alpha; save it without alpha")
        return _deep(
            values,
            white_is_0=photometric == _WHITE_IS_0,
            white=_declared_white(page, values),
            turned=orientation in range(2, 9),
        )


def _is_preview(page: tifffile.TiffPage | tifffile.TiffFrame) -> bool:
    return bool(getattr(page, "is_reduced", False) or getattr(page, "is_mask", False))


def _full(dtype: np.dtype[Any]) -> float:
    """What is opaque."""
    return 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)


def _read_page(
    page: tifffile.TiffPage, data: bytes, number: int, orientation: int
) -> npt.NDArray[Any]:
    """The values of a page, upright, shape (H, W) or (H, W, C)."""
    try:
        values = np.asarray(page.asarray())
    except (ValueError, NotImplementedError) as error:
        if "imagecodecs" not in str(error):
            raise
        # libtiff, in Pillow, reads these compressions, but color of 8 bits alone
        if page.samplesperpixel != 1:
            compression = tifffile.COMPRESSION(page.compression).name
            raise _UnreadableError(
                f"is deep color compressed by {compression}; save it uncompressed or with Deflate, "
                "or install imagecodecs"
            ) from None
        orientation = 1  # Pillow turns TIFF files upright
        with _open(data) as image:
            image.seek(number)
            values = np.array(image)
        if page.dtype is not None and np.dtype(page.dtype).itemsize == values.dtype.itemsize:
            values = values.view(page.dtype)  # Pillow takes unsigned 32 bits for signed ones
    if values.ndim == 3 and page.planarconfig == 2 and page.samplesperpixel > 1:
        values = np.moveaxis(values, 0, -1)
    if values.ndim not in (2, 3):
        raise _UnreadableError(f"has {values.ndim} dimensions; save each slice as a file")
    return _turn(values, orientation)


def _declared_white(page: tifffile.TiffPage, values: npt.NDArray[Any]) -> float | None:
    """The largest possible value by the file's header, where that is less than the type's."""
    if values.dtype.kind == "f":
        return None
    bits = page.bitspersample
    if bits < 8 * values.dtype.itemsize:
        return float(2**bits - 1)
    tag = page.tags.get("MaxSampleValue")
    white = float(np.max(tag.value)) if tag else 0.0
    return white if values.size and white >= values.max() else None


def _turn(values: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Turn upright what is stored in one of EXIF's eight orientations."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values


def _check_size(rows: int, columns: int, max_megapixels: float) -> None:
    if rows * columns > max_megapixels * 1e6:
        raise _UnreadableError(
            f"has {columns} x {rows} pixels, more than {max_megapixels:g} megapixels; cut it into "
            "several images, or raise data.max_megapixels"
        )


def _check_pages(pages: int) -> None:
    if pages > 1:
        raise _UnreadableError(f"holds {pages} images (pages or frames); save each as its own file")
