"""Reading and resizing of ground truth masks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict
from scipy.ndimage import label

from almrr_pipeline.common.arrays import MaskArray
from almrr_pipeline.common.decoding import Stored, decode
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import Reading, read_bytes

_ANOMALOUS_ABOVE = 127
"""Half of white: lossy compression and resizing leave values between 0 and 255."""
_FEW = 8  # different values above 0 that are classes; smoothed outlines have more,
_CLASS_PIXELS = 16  # or, around the smallest defects, fewer pixels of each
_GRAY = 0.02  # of an image, that outlines of any defect leave between black and white
_MOST = 0.9  # of an image; no defect covers it, an inverted mask does,
_AROUND = 0.25  # or, where defects are large, a good part of the image with its whole border
_EIGHT_CONNECTED = np.ones((3, 3))


class MaskReading(BaseModel):
    """Which values of a mask are anomalous; the defaults take what is certain, and name the rest.

    Values are those of the file, color by its largest channel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float | None = None  # above it; by default half of white
    values: tuple[int, ...] = ()  # exactly these, such as classes; (0,) for inverted masks
    max_megapixels: float = Reading().max_megapixels


@dataclass(frozen=True)
class MaskFacts:
    """What a mask file holds, and how it was taken."""

    mask: MaskArray  # True where anomalous, shape (H, W), upright
    values: tuple[float, ...]  # different values, rising, at most nine of them
    problem: str  # a sentence without its subject, such as "covers 97 % of ..."; empty if certain
    turned: bool = False  # by EXIF

    @property
    def coverage(self) -> float:
        """Fraction of the image that is anomalous."""
        return float(self.mask.mean())

    @property
    def is_smoothed(self) -> bool:
        """Whether the values are those of smoothed outlines: white, and others at both sides."""
        return self.values[-1] == 255 and any(127 < value < 255 for value in self.values)


def read_mask(
    path: Path, *, name: Path | None = None, reading: MaskReading | None = None
) -> MaskArray:
    """Read a ground truth mask; by default values above 127 of 255 are anomalous.

    The authors' code counted 255 alone. A mask of 16 bits or more without values above 255 is taken
    for an 8-bit one, because many tools save masks so; one that holds 0 and 1 alone for 0 and 255.
    Of a mask whose colors are all equal, the alpha channel is taken. Raises as `read_image`, and
    where colors and alpha contradict each other; errors show `name` instead of the path.

    Returns:
        bool, shape (H, W), upright.
    """
    return inspect_mask(path, name=name, reading=reading).mask


def inspect_mask(
    path: Path, *, name: Path | None = None, reading: MaskReading | None = None
) -> MaskFacts:
    """Read a mask as `read_mask`, and say what about it is doubtful."""
    shown, reading = name or path, reading or MaskReading()
    data = read_bytes(path, name=name)
    stored = decode(data, shown, max_megapixels=reading.max_megapixels)
    levels, white = _levels(stored, shown)
    values, counts = np.unique(levels, return_counts=True)
    if reading.values:
        mask, problem = np.isin(levels, reading.values), ""
    elif reading.threshold is not None:
        mask, problem = levels > reading.threshold, ""
    else:
        if values[-1] == 1 and white > 1 and not stored.is_lossy and len(values) <= 2:
            white = 1.0
        mask = levels > _ANOMALOUS_ABOVE / 255 * white
        problem = _doubt(values, counts, white, is_lossy=stored.is_lossy)
    coverage = mask.mean()
    if not problem and (coverage > _MOST or (coverage > _AROUND and _border(mask).all())):
        problem = (
            f"covers {coverage:.0%} of the image: inverted? State the anomalous values in "
            "data.mask_values, such as [0]"
        )
    return MaskFacts(mask, tuple(map(float, values[: _FEW + 1])), problem, stored.turned)


def explain_emptiness(masks: Iterable[MaskFacts], reading: MaskReading) -> str:
    """Why none of these masks has an anomalous pixel: their values, and which ones would be."""
    values = sorted({value for mask in masks for value in mask.values})
    listed = ", ".join(f"{value:g}" for value in values[:_FEW])
    more = " and others" if len(values) > _FEW else ""
    wanted = "values above half of white are anomalous"
    if reading.values:
        wanted = f"by data.mask_values {', '.join(map(str, reading.values))} is anomalous"
    elif reading.threshold is not None:
        wanted = f"by data.mask_threshold values above {reading.threshold:g} are anomalous"
    return f"no anomalous pixel in any mask: they hold {listed}{more}, and {wanted}"


def explain_size(
    mask: MaskFacts,
    size: tuple[int, int],
    *,
    image: Path | None = None,
    image_turned: bool = False,
) -> str | None:
    """Why a mask does not fit its image of `size` = (rows, columns); None if it does.

    Returns:
        The rest of a sentence that begins with the mask's name.
    """
    shape = mask.mask.shape
    cause = "EXIF turns the image upright and not the mask: save both upright"
    one_turned = image_turned != mask.turned
    if shape == size:
        return f"may lie otherwise than its image: {cause}" if one_turned else None
    named = f"its image {image.as_posix()}" if image else "its image"
    sizes = f"has {shape[1]} x {shape[0]} pixels, {named} has {size[1]} x {size[0]}"
    if one_turned and shape == size[::-1]:
        return f"{sizes}; {cause}"
    return f"{sizes}; a mask has the size of its image"


def resize_mask(mask: MaskArray, size: tuple[int, int]) -> MaskArray:
    """Resize to `size` = (rows, columns), nearest neighbor, but no region (8-connected) is lost.

    A region of which the nearest neighbor takes no pixel keeps those pixels of the result that it
    covers most: all with more than half of the largest area that it has in one. All other regions
    are as the nearest neighbor leaves them. bool (H, W) in and out.
    """
    if mask.shape == tuple(size):
        return mask
    resized = np.array(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
    labels, count = label(mask, _EIGHT_CONNECTED)
    kept = Image.fromarray(labels.astype(np.int32)).resize(size[::-1], Image.Resampling.NEAREST)
    is_lost = np.ones(count + 1, bool)
    is_lost[np.unique(np.asarray(kept))] = is_lost[0] = False
    if not is_lost.any():
        return resized
    rows, columns = np.nonzero(is_lost[labels])
    region = labels[rows, columns].astype(np.int64)
    cell = rows * size[0] // mask.shape[0] * size[1] + columns * size[1] // mask.shape[1]
    pairs, areas = np.unique(region * (size[0] * size[1]) + cell, return_counts=True)
    region, cell = np.divmod(pairs, size[0] * size[1])
    largest = np.zeros(count + 1, np.int64)
    np.maximum.at(largest, region, areas)
    resized.flat[cell[2 * areas > largest[region]]] = True
    return resized


def _levels(stored: Stored, path: Path) -> tuple[npt.NDArray[Any], float]:
    """The values of a mask, shape (H, W), and the one that is white."""
    if stored.values is not None:
        values = stored.values if stored.values.ndim == 2 else stored.values.max(axis=2)
        highest = float(values.max())
        white = next((white for white in (1.0, 255.0) if highest <= white), 65535.0)
        if values.dtype.kind != "f":
            white = stored.white or (255.0 if highest <= 255 else max(65535.0, highest))
        return (white - values if stored.white_is_0 else values), white
    image = stored.image
    assert image is not None
    if not image.has_transparency_data:
        return _color_levels(image), 255.0
    rgba = np.asarray(image.convert("RGBA"))
    color, alpha = rgba[..., :3].max(axis=2), rgba[..., 3]
    if alpha.min() == alpha.max():
        return color, 255.0
    if color.min() == color.max():
        return alpha, 255.0
    differing = int(((color > _ANOMALOUS_ABOVE) != (alpha > _ANOMALOUS_ABOVE)).sum())
    if 20 * differing > int((alpha > _ANOMALOUS_ABOVE).sum()):  # more than a smoothed outline
        raise AlmrrError(
            f"{path}: its colors and its alpha channel show different shapes; save the mask as "
            "white on black, without alpha."
        )
    return color, 255.0


def _color_levels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The largest channel: red on black is anomalous, although red is dark."""
    if image.mode in {"1", "L"}:
        return np.asarray(image.convert("L"))
    color = np.asarray(image.convert("RGB"))
    levels: npt.NDArray[np.uint8] = color.max(axis=2)
    if image.mode == "P" and not (levels == color.min(axis=2)).all():
        levels = np.where(levels > 0, np.uint8(255), np.uint8(0))  # a color for each class
    return levels


def _border(mask: MaskArray) -> MaskArray:
    return np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])


def _doubt(
    values: npt.NDArray[Any], counts: npt.NDArray[np.int64], white: float, *, is_lossy: bool
) -> str:
    """What about the values of a mask is doubtful, white being anomalous; empty if nothing.

    counts: pixels of each value.
    """
    least = 8 / 255 * white if is_lossy else 0.0  # compression leaves lower ones
    above_0 = [float(value) for value in values if value > least]
    is_dropped = (values > least) & (values <= _ANOMALOUS_ABOVE / 255 * white)
    dropped = values[is_dropped]
    is_large = counts[is_dropped].max(initial=0) >= _CLASS_PIXELS
    is_number = 0 < dropped.max(initial=0) <= _FEW and not is_lossy  # 1, next to 255 to ignore
    is_class = len(above_0) <= _FEW and bool(is_large or is_number)
    between = counts[(values > 0.1 * white) & (values < 0.9 * white)].sum()
    if len(values) > _FEW and between > max(_GRAY * counts.sum(), counts[values > least].sum() / 2):
        return (
            f"is gray for {between / counts.sum():.0%} of its pixels: an image in place of its "
            "mask? Save the mask as white on black, or state data.mask_threshold"
        )
    listed = ", ".join(f"{value:g}" for value in above_0[:_FEW])
    is_between = (values > _ANOMALOUS_ABOVE / 255 * white) & (values < 0.9 * white)
    if not len(dropped) and len(above_0) == 2 and counts[is_between].max(initial=0) > _CLASS_PIXELS:
        return (
            f"holds the values {listed} of {white:g}, both taken for anomalous: is one of them "
            "to be ignored? State data.mask_values"
        )
    if not len(dropped) or (len(dropped) < len(above_0) and not is_class):
        return ""
    return (
        f"holds the values {listed} of {white:g}, and values from {dropped[0]:g} to "
        f"{dropped[-1]:g} would be dropped; state data.mask_threshold or data.mask_values"
    )
