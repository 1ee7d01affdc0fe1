"""Images of results: panels for the report, overlays for `almrr predict`.

Drawn with numpy and Pillow: a panel takes some ten milliseconds, so that a test set can be drawn.
An argument with the wrong number of axes is an AlmrrError.
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from almrr_pipeline.common.arrays import (
    AnomalyMap,
    ImageArray,
    MaskArray,
    allocate,
    release_pages,
)
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import resize_image
from almrr_pipeline.common.masks import resize_mask

Color = tuple[int, int, int]

# Yellow and blue stay apart for every kind of color vision, and from most textures' colors.
FOUND_COLOR: Color = (255, 212, 0)
"""Outline of the pixels above the threshold."""
TRUTH_COLOR: Color = (64, 196, 255)
"""Outline of the ground truth."""
_SHADE: Color = (12, 14, 18)
_BACKGROUND: Color = (18, 20, 25)
_EMPTY: Color = (34, 37, 44)
_TEXT: Color = (214, 218, 226)
_QUIET: Color = (138, 145, 158)
_ALARM: Color = (255, 116, 92)
_CLEAR: Color = (112, 214, 150)

_TILE = 272  # edge of the square box that a panel's tile is fitted into, in pixels
_GAP = 6
_FOOT = 26
PANEL_TILES = tuple((_GAP + column * (_TILE + _GAP), _GAP, _TILE) for column in range(4))
"""Left, top and width of a panel's four tiles, in pixels; they end `PANEL_FOOT` above its end."""
PANEL_FOOT = _GAP + _FOOT
_OUTLINE = 3  # pixels that the widest outline takes around a region, dark edge included
_BAND = 128  # rows of an overlay that are drawn at a time, which takes 30 bytes a pixel
_FONT_SIZE = 13
_SMALLEST_OVERLAY = 360  # narrower images are enlarged in draw_overlay: the caption needs the width
_font = cache(ImageFont.load_default)  # by size
_HEAT_OPACITY = 0.6  # at its strongest the image still shines through
HEAT_TOP = 1.6
"""End of the heat's scale as a multiple of the threshold: what is found begins at orange."""


def heat_end(threshold: float | None) -> float:
    """Return the value of the palest color: 1.6 times the pixel threshold, or 1 without one."""
    return HEAT_TOP * threshold if threshold else 1.0


def color_map(anomaly_map: npt.NDArray[np.floating], end: float = 1.0) -> ImageArray:
    """Color an anomaly map (H, W) on the scale 0 (black) to `end` (pale yellow): uint8 RGB.

    Values outside take the color of the nearer end, NaN that of 0. The colors are matplotlib's
    "inferno": its lightness rises evenly, so that equal steps look equal, in gray print too.
    """
    values = np.fmin(np.fmax(anomaly_map / end, 0.0), 1.0)  # of NaN and a number the number
    return np.asarray(_color_table().take(np.rint(values * 255).astype(np.uint8), axis=0))


@cache
def _color_table() -> ImageArray:
    """The colors of the values k / 255, (256, 3): a look-up is a third of matplotlib's work."""
    from matplotlib import colormaps  # slow to import, and not needed to predict without overlays

    return np.ascontiguousarray(colormaps["inferno"](np.arange(256), bytes=True)[:, :3])


def draw_panel(
    image: ImageArray, mask: MaskArray | None, anomaly_map: AnomalyMap, *, threshold: float | None
) -> ImageArray:
    """Draw one result as a row: image | ground truth | anomaly map | image with outlines.

    The outlines run just outside what they enclose: pixels above the threshold in yellow, the
    ground truth in blue. Mask and map are resized to the image.

    Args:
        image: uint8 RGB, shape (H, W, 3).
        mask: ground truth, bool, any shape; None where there is none.
        anomaly_map: float32 in [0, 1], any shape.
        threshold: of pixels, marked on the heat's scale, which ends at 1.6 times it; None outlines
            the truth alone, and the scale ends at 1.

    Returns:
        uint8 RGB, 1118 pixels wide, at most 310 high.
    """
    rows, columns = _checked_size(image, mask, anomaly_map)
    scale = _TILE / max(rows, columns)
    size = max(1, round(rows * scale)), max(1, round(columns * scale))
    image, heat = resize_image(image, size), _resize_map(anomaly_map, size)
    truth = None if mask is None else resize_mask(mask, size)
    white = np.zeros(size, bool) if truth is None else truth
    truth_tile = np.where(white[..., None], 255, _EMPTY).astype(np.uint8)
    colored = color_map(heat, heat_end(threshold))
    tiles = [image, truth_tile, colored, _draw_outlines(image, truth, heat, threshold)]
    canvas = Image.new("RGB", (4 * _TILE + 5 * _GAP, size[0] + 2 * _GAP + _FOOT), _BACKGROUND)
    for column, tile in enumerate(tiles):
        left = _GAP + column * (_TILE + _GAP)
        canvas.paste(Image.fromarray(tile), (left + (_TILE - size[1]) // 2, _GAP))
    _write_feet(ImageDraw.Draw(canvas), size[0] + _GAP, truth, threshold)
    _draw_scale(canvas, left=_GAP + 2 * (_TILE + _GAP), top=size[0] + _GAP, threshold=threshold)
    return np.asarray(canvas)


def draw_overlay(
    image: ImageArray,
    anomaly_map: AnomalyMap,
    *,
    threshold: float | None,
    score: float,
    is_anomalous: bool | None,
) -> ImageArray:
    """Draw the result of one image: heat, an outline at the threshold, and the verdict below.

    Args:
        image: uint8 RGB, shape (H, W, 3).
        anomaly_map: float32 in [0, 1], any shape, resized to the image.
        threshold: pixel threshold of the outline; None draws none.
        score: anomaly score of the whole image.
        is_anomalous: the verdict; None where the model has no threshold.

    Returns:
        uint8 RGB, as large as the image, which is enlarged if it is narrow; and a strip below.
    """
    rows, columns = _checked_size(image, None, anomaly_map)
    factor = -(-_SMALLEST_OVERLAY // columns)
    size = (rows * factor, columns * factor)
    image, heat = resize_image(image, size), _resize_map(anomaly_map, size)
    verdict = _write_verdict(size[1], score, is_anomalous)
    overlay: ImageArray = allocate((size[0] + len(verdict), size[1], 3), np.uint8)
    overlay[size[0] :] = verdict
    for top in range(0, size[0], _BAND):
        first, end = max(0, top - _OUTLINE), min(top + _BAND, size[0])
        rows_around = slice(first, end + _OUTLINE)
        drawn = _warm(image[rows_around], heat[rows_around], threshold)
        overlay[top:end] = drawn[top - first : end - first]
        for array in (image, heat, overlay):
            release_pages(array)
    return overlay


def _warm(image: ImageArray, heat: AnomalyMap, threshold: float | None) -> ImageArray:
    """Draw heat and outline over an image."""
    end = heat_end(threshold)
    opacity = _HEAT_OPACITY * np.clip(heat / end, 0.0, 1.0)[..., None]
    warm = (1.0 - opacity) * image
    warm += opacity * color_map(heat, end)
    return _draw_outlines(np.rint(warm, out=warm).astype(np.uint8), None, heat, threshold)


def encode_image(image: ImageArray) -> bytes:
    """Encode a drawn image, uint8 RGB (H, W, 3), as WebP with sharp colored lines."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "WEBP", quality=82, method=6, use_sharp_yuv=True)
    return stream.getvalue()


def outline(region: MaskArray, *, width: int) -> MaskArray:
    """Mark the line of `width` pixels just around a region; bool (H, W) in and out."""
    # By its largest value a square grows along one axis after the other: half of dilation's time.
    grown = ndimage.maximum_filter(region, size=2 * width + 1, mode="constant")
    return np.asarray(grown & ~region)


def _checked_size(
    image: ImageArray, mask: MaskArray | None, anomaly_map: AnomalyMap
) -> tuple[int, int]:
    """Rows and columns of an image, after checks of the axes of all three."""
    axes = (image.ndim, image.shape[2:], 2 if mask is None else mask.ndim, anomaly_map.ndim)
    if axes != (3, (3,), 2, 2):
        shapes = f"{image.shape}, {None if mask is None else mask.shape}, {anomaly_map.shape}"
        raise AlmrrError(
            f"To draw takes an image (H, W, 3), a mask (H, W) and a map (H, W), not {shapes}."
        )
    return image.shape[0], image.shape[1]


def _resize_map(anomaly_map: AnomalyMap, size: tuple[int, int]) -> AnomalyMap:
    if anomaly_map.shape == size and anomaly_map.dtype == np.float32:
        return anomaly_map if _is_finite(anomaly_map) else np.nan_to_num(anomaly_map, nan=0.0)
    values = np.ascontiguousarray(np.nan_to_num(anomaly_map, nan=0.0), dtype=np.float32)
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))


def _is_finite(anomaly_map: AnomalyMap) -> bool:
    """Whether no value is NaN or above all numbers; reads a band at a time."""
    largest = []
    for top in range(0, len(anomaly_map), _BAND):
        largest.append(anomaly_map[top : top + _BAND].max())
        release_pages(anomaly_map)
    return bool(np.isfinite(largest).all())


def _draw_outlines(
    image: ImageArray, truth: MaskArray | None, heat: AnomalyMap, threshold: float | None
) -> ImageArray:
    """Draw both outlines on a copy, each with a dark edge that parts it from bright textures."""
    drawn = image.copy()
    found = None if threshold is None else np.asarray(heat > threshold)
    for region, color, width in ((truth, TRUTH_COLOR, 1), (found, FOUND_COLOR, _OUTLINE - 1)):
        if region is not None:
            drawn[outline(region, width=width + 1)] = _SHADE
            drawn[outline(region, width=width)] = color
    return drawn


def _write_feet(
    draw: ImageDraw.ImageDraw, top: int, truth: MaskArray | None, threshold: float | None
) -> None:
    """Write the labels below the tiles, and the key of the outlines' colors at the right."""
    empty = "" if truth is None or truth.any() else ": no defect"
    of_mask = "no ground truth" if truth is None else f"ground truth{empty}"
    of_outlines = "no threshold" if threshold is None else f"above {threshold:.3g}"
    font = _font(_FONT_SIZE)
    for column, text in ((0, "image"), (1, of_mask), (3, of_outlines)):
        draw.text((_GAP + column * (_TILE + _GAP), top + 8), text, _QUIET, font)
    right = 4 * (_TILE + _GAP)
    keys = [("found", FOUND_COLOR)] * (threshold is not None)
    for word, color in keys + [("truth", TRUTH_COLOR)] * (truth is not None):
        right -= round(draw.textlength(word, font))
        draw.text((right, top + 8), word, _TEXT, font)
        draw.line((right - 16, top + 17, right - 5, top + 17), color, 2)
        right -= 28


def _draw_scale(canvas: Image.Image, *, left: int, top: int, threshold: float | None) -> None:
    """Draw the heat map's scale, from 0, with a mark at the threshold."""
    draw, font = ImageDraw.Draw(canvas), _font(_FONT_SIZE)
    draw.text((left, top + 8), "anomaly map", _QUIET, font)
    end = heat_end(threshold)
    start, width, height = left + 106, _TILE - 106 - 38, 9
    bar = color_map(np.tile(np.linspace(0.0, 1.0, width), (height, 1)))
    canvas.paste(Image.fromarray(bar), (start, top + 12))
    draw.text((start - 13, top + 8), "0", _QUIET, font)
    draw.text((start + width + 6, top + 8), f"{end:.2g}", _QUIET, font)
    if threshold is not None:
        at = start + round(min(max(threshold / end, 0.0), 1.0) * (width - 1))
        draw.line((at, top + 9, at, top + 12 + height + 2), FOUND_COLOR, 2)


def _write_verdict(width: int, score: float, is_anomalous: bool | None) -> ImageArray:
    """Draw the strip below an image: the verdict in words and color, the score at the right."""
    size = max(_FONT_SIZE + 3, width // 40)
    words = {None: ("no threshold", _QUIET), True: ("defective", _ALARM), False: ("normal", _CLEAR)}
    word, color = words[is_anomalous]
    strip = Image.new("RGB", (width, 2 * size), _BACKGROUND)
    draw, font, left, radius = ImageDraw.Draw(strip), _font(size), size // 2, size // 3
    draw.ellipse((left, size - radius, left + 2 * radius, size + radius), color)
    draw.text((left + size, size), word, color, font, anchor="lm")
    draw.text((width - left, size), f"score {score:.3f}", _TEXT, font, anchor="rm")
    return np.asarray(strip)
