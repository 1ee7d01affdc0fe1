"""Manifest of a category: its images with split, label, defect type and mask.

Building it opens every image once, so that a broken one is found before the training.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy.ndimage import label

from almrr_pipeline.common.errors import AlmrrError, quote
from almrr_pipeline.common.images import (
    ImageFacts,
    Reading,
    decide_ranges,
    find_narrow_range,
    inspect_bytes,
    read_bytes,
)
from almrr_pipeline.common.masks import MaskReading, explain_size, inspect_mask
from almrr_pipeline.common.progress import track
from almrr_pipeline.config import DataSettings
from almrr_pipeline.datasets.looks import Look, compute_look, is_compared

logger = logging.getLogger(__name__)

_OF_ITEM = ("image", "mask", "split", "label", "defect_type", "specimen")
_OF_VALUES = ("mode", "dtype", "low", "high", "white")
_REQUIRED = (*_OF_ITEM, "width", "height", "sha256")
COLUMNS = (*_REQUIRED, *_OF_VALUES)  # older manifests have the required ones alone
_NUMBERS = {"width": "int64", "height": "int64", "low": "float64", "high": "float64"}
_PLACE = r"(?!/)(?!(.*/)?\.\.(/|$))[^\x00\r\n]"  # below a folder
_NUMBER = r"[+-]?\d{1,40}(\.\d{0,40})?([eE][+-]?\d{1,2})?"
_PATTERNS = {
    "image": rf"{_PLACE}+",
    "mask": rf"({_PLACE}+)?",
    "split": "train|validation|test",
    "label": "normal|defective",
    "width": r"[1-9]\d{0,8}",
    "height": r"[1-9]\d{0,8}",
    "sha256": "[0-9a-f]{64}",
    "dtype": r"u?int(8|16|32|64)|float(16|32|64)",
    "low": _NUMBER,
    "high": _NUMBER,
    "white": rf"({_NUMBER})?",
}
"""What a manifest's values can be."""
_NAMED = 5  # files that a message names before it counts the rest
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Item:
    """An image and its role in the protocol; it has not been opened yet."""

    image: Path
    mask: Path | None
    """Ground truth; None for normal images, and for defective ones of a dataset without masks."""
    split: Split  # normal images of `validation` serve the thresholds alone; see `training_split`
    label: Literal["normal", "defective"]
    defect_type: str  # `good` for normal images
    specimen: str = ""
    """Name of the specimen, where several images show the same one; these stay in one split."""


@dataclass(frozen=True)
class OpenedMask:
    """What is kept of a mask."""

    coverage: float  # fraction of the image that it marks
    regions: tuple[int, ...]  # areas in pixels
    doubt: str  # a sentence without its subject: why its meaning is uncertain; empty if it is not
    is_smoothed: bool = False  # the doubt is about smoothed outlines alone


@dataclass(frozen=True)
class Opened:
    """What is kept of an image that was opened, and of its mask: some kilobytes."""

    item: Item
    facts: ImageFacts
    sha256: str  # of the file
    content: str  # hash of the pixels, which equal images of different formats share
    look: Look | None = None  # of those that are compared
    mask: OpenedMask | None = None


@dataclass(frozen=True)
class Counts:
    """Numbers of images that a dataset is published with."""

    train: int
    test_normal: int
    test_defective: int
    validation: int = 0

    def __str__(self) -> str:
        validation = f"{self.validation} validation, " if self.validation else ""
        return (
            f"{self.train} training, {validation}{self.test_normal} normal and "
            f"{self.test_defective} defective test images"
        )


def count_items(items: Iterable[Item]) -> Counts:
    """Count images by split and label."""
    found = Counter((item.split, item.label) for item in items)
    tested = found["test", "normal"], found["test", "defective"]
    return Counts(found["train", "normal"], *tested, found["validation", "normal"])


def check_counts(
    items: Sequence[Item], expected: Counts | None, *, name: str, strict: bool
) -> str | None:
    """Return the difference from the published numbers of images as a sentence, or None.

    Raises:
        AlmrrError: there is no training image, or the numbers differ and `strict` is set.
    """
    found = count_items(items)
    if not found.train:
        raise AlmrrError(f"{name}: there is no normal image to train on; check where it is from.")
    if expected is None or found == expected:
        return None
    difference = f"{name}: {found}; published are {expected}"
    if strict:
        raise AlmrrError(f"{difference}. Fetch it again, or set data.strict to false.")
    return difference


def build_manifest(
    items: Sequence[Item],
    *,
    root: Path,
    expected: Counts | None,
    strict: bool,
    settings: DataSettings | None = None,
    name: str | None = None,
) -> pd.DataFrame:
    """Open every image and mask once and list them.

    `items` are the images of the category `name`, all under `root`, the data folder. Other numbers
    than the `expected` ones are refused if `strict`, and logged otherwise.

    Returns:
        One row per image, sorted by split and image: image and mask (paths relative to `root`, with
        forward slashes; no mask is ""), split (train, validation or test), label (normal or
        defective), defect_type, specimen ("" where no two images show the same one), width and
        height in pixels (upright), sha256 of the file.

    Raises:
        AlmrrError: there is no training image; an image cannot be decoded; a mask is missing or of
            another size than its image; a name is not UTF-8; or two splits share an image or a
            specimen. Names the files.
    """
    common = os.path.commonpath([item.image.parent for item in items]) if items else root
    name = name or Path(common).name  # the category's folder, if it has a training image
    if difference := check_counts(items, expected, name=name, strict=strict):
        logger.warning("%s", difference)
    rows = [_row(opened, root) for opened in inspect_items(items, root=root, settings=settings)]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values(["split", "image"], ignore_index=True)


def read_manifest(path: Path) -> pd.DataFrame:
    """Read the manifest.csv of a category; "" stands for what a row does not have.

    Raises:
        AlmrrError: it is missing, no such table, or holds a value that no manifest has; names the
            first row.
    """
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype=str).fillna("")
    except FileNotFoundError:
        raise AlmrrError(f"There is no manifest at {path}; run the stage fetch.") from None
    except (ValueError, OverflowError, MemoryError, OSError, pd.errors.ParserError) as error:
        message = f"{path} is no manifest ({quote(error)}); fetch the category again."
        raise AlmrrError(message) from None
    needed = _REQUIRED if set(_OF_VALUES).isdisjoint(table) else COLUMNS
    missing = [name for name in needed if name not in table]
    if missing or not isinstance(table.index, pd.RangeIndex):  # lines have more values than columns
        found = f"has no column {missing[0]}" if missing else "has lines of other lengths"
        raise AlmrrError(f"{path} {found}; fetch the category again.")
    for name, pattern in _PATTERNS.items():
        if name in table:
            wrong = ~table[name].str.fullmatch(pattern)
            if wrong.any():
                value, row = table[name][wrong].iloc[0][:60], int(wrong.argmax()) + 2
                found = f"{path}, line {row}: {name} cannot be {value!r}"
                raise AlmrrError(f"{found}; fetch the category again.")
    return table.astype({name: kind for name, kind in _NUMBERS.items() if name in table})


def _row(opened: Opened, root: Path) -> tuple[object, ...]:
    """The values of `COLUMNS`."""
    item, facts = opened.item, opened.facts
    height, width = facts.size
    return (
        item.image.relative_to(root).as_posix(),
        item.mask.relative_to(root).as_posix() if item.mask else "",
        *(item.split, item.label, item.defect_type, item.specimen),
        *(width, height, opened.sha256, facts.mode, facts.dtype, facts.low, facts.high),
        "" if facts.white is None else facts.white,
    )


def has_validation(manifest: pd.DataFrame) -> bool:
    """Whether the dataset has validation images of its own."""
    return bool((manifest["split"] == "validation").any())


def training_split(manifest: pd.DataFrame, *, fraction: float) -> tuple[list[str], list[str]]:
    """Split the normal images into those to train on and those for validation.

    The dataset's own validation images are used where there are any. Otherwise `split_validation`
    chooses whole specimens, or checksums where specimens are unknown: the choice does not depend on
    paths, and copies of an image stay on the same side.

    Returns:
        (training, validation): paths relative to the data folder, in the order of the manifest;
        `fraction`, in [0, 0.5], of them for validation.
    """
    normal = manifest[(manifest["split"] == "train") & (manifest["label"] == "normal")]
    if has_validation(manifest):
        own = manifest.loc[manifest["split"] == "validation", "image"]
        return normal["image"].tolist(), own.tolist()
    groups = normal["specimen"].where(normal["specimen"] != "", normal["sha256"])
    _, validation = split_validation(list(dict.fromkeys(groups)), fraction)
    chosen = groups.isin(validation)
    return normal.loc[~chosen, "image"].tolist(), normal.loc[chosen, "image"].tolist()


def split_validation(names: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Choose the names with the lowest sha256 for validation.

    The choice depends on the names alone; adding or removing one changes it by at most two.

    Returns:
        (training, validation), each in the order of `names`. Validation has at least one name if
        `fraction`, in [0, 0.5], is above 0 and there are two or more, all different, names.
    """
    count = max(1, round(fraction * len(names))) if fraction > 0 and len(names) > 1 else 0
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = set(ranked[:count])
    training = [name for name in names if name not in chosen]
    return training, [name for name in names if name in chosen]


def inspect_items(
    items: Sequence[Item], *, root: Path, settings: DataSettings | None = None
) -> list[Opened]:
    """Open every image and mask under `root`, in threads (decoding releases the GIL).

    Raises:
        AlmrrError: as `build_manifest` for the files; names all broken ones at once.
    """
    opened, failures = [], []
    with (
        ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads,
        track(len(items), unit="images", description="check images") as advance,
    ):
        settings = settings or DataSettings()
        for future in [
            threads.submit(_open, item, root, settings, has_look=is_compared(index, len(items)))
            for index, item in enumerate(items)
        ]:
            try:
                opened.append(future.result())
            except AlmrrError as error:
                failures.append(str(error))
            advance(1)
    if failures:
        if len(failures) > _NAMED:
            failures[_NAMED:] = [f"And {len(failures) - _NAMED} more of this kind."]
        raise AlmrrError(" ".join(failures))
    names = {each.item.image: each.item.image.relative_to(root).as_posix() for each in opened}
    contents = [(each.item.split, each.content, names[each.item.image]) for each in opened]
    _refuse_shared(contents, "The same image is", "remove one of each pair")
    what, advice = "Images of the same specimen are", "keep each specimen in one split"
    specimens = [
        (each.item.split, each.item.specimen, names[each.item.image])
        for each in opened
        if each.item.specimen
    ]
    _refuse_shared(specimens, what, advice)
    return opened


def _open(item: Item, root: Path, settings: DataSettings, *, has_look: bool) -> Opened:
    """Open an image and its mask under `root`."""
    try:
        str(item.image).encode("utf-8")
    except UnicodeEncodeError:
        message = f"{str(item.image)!r}: the name is not UTF-8 text; rename the file."
        raise AlmrrError(message) from None
    name = item.image.relative_to(root)
    opened = open_image(item, name, settings, has_look=has_look)
    if item.mask is None:
        return opened
    mask = open_mask(item.mask, item.mask.relative_to(root), opened, name, settings)
    return replace(opened, mask=mask)


def open_image(item: Item, name: Path, settings: DataSettings, *, has_look: bool) -> Opened:
    """Open an image, not its mask; AlmrrError, with `name` for the path, if it is broken."""
    data = read_bytes(item.image, name=name)
    facts, pixels = inspect_bytes(data, name, Reading(max_megapixels=settings.max_megapixels))
    content = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    look = compute_look(pixels) if has_look else None
    return Opened(item, facts, hashlib.sha256(data).hexdigest(), content, look)


def open_mask(
    path: Path, name: Path, image: Opened, image_name: Path, settings: DataSettings
) -> OpenedMask:
    """Open the mask of an opened image; AlmrrError if it is missing, broken or of another size."""
    if not path.is_file():
        missing = f"{image_name.as_posix()} is defective, but its mask {name.as_posix()} is not"
        raise AlmrrError(f"{missing} there; add it, or remove the image.")
    found = inspect_mask(path, name=name, reading=mask_reading(settings))
    size, turned = image.facts.size, image.facts.turned
    difference = explain_size(found, size, image=image_name, image_turned=turned)
    if difference and found.mask.shape != size:
        raise AlmrrError(f"{name.as_posix()} {difference}.")
    labels, _ = label(found.mask, np.ones((3, 3)))
    regions = tuple(int(area) for area in np.bincount(labels.ravel())[1:])
    is_smoothed = found.is_smoothed and not difference
    return OpenedMask(found.coverage, regions, difference or found.problem, is_smoothed)


def mask_reading(settings: DataSettings) -> MaskReading:
    """Which values of the masks are anomalous, by the settings."""
    return MaskReading(
        threshold=settings.mask_threshold,
        values=settings.mask_values,
        max_megapixels=settings.max_megapixels,
    )


def image_reading(manifest: pd.DataFrame, settings: DataSettings) -> Reading:
    """How a category's images become 8-bit RGB, decided by its normal training images alone.

    Those for validation are among them, test images are not. Logs a warning where these images use
    less than a sixteenth of their range.

    Raises:
        AlmrrError: no range can be decided; see `decide_ranges`.
    """
    is_normal = (manifest["label"] == "normal") & (manifest["split"] != "test")
    table = manifest.reindex(columns=["height", "width", *_OF_VALUES])[is_normal]
    facts = [
        ImageFacts(
            size=(row["height"], row["width"]),
            mode=str(row["mode"]),
            dtype=str(row["dtype"]),
            low=float(row["low"]),
            high=float(row["high"]),
            white=float(row["white"]) if row["white"] not in ("", None) else None,
        )
        for row in table.dropna(subset=["dtype"]).to_dict("records")
    ]
    ranges = decide_ranges(facts, settings.value_range)
    if narrow := find_narrow_range(facts, ranges):
        logger.warning("%s: %s", Path(manifest["image"].iloc[0]).parts[1], narrow)
    return Reading(value_ranges=ranges, max_megapixels=settings.max_megapixels)


def _refuse_shared(images: Iterable[tuple[str, str, str]], what: str, advice: str) -> None:
    """Refuse images, given as split, key and name, of different splits with the same key."""
    by_split: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for split, key, name in images:
        by_split[split][key].append(name)
    for earlier, later in combinations(("train", "validation", "test"), 2):
        pairs = [
            f"{by_split[earlier][key][0]} and {name}"
            for key, names in by_split[later].items()
            for name in names
            if key in by_split[earlier]
        ]
        if not pairs:
            continue
        named = "; ".join(pairs[:_NAMED])
        if len(pairs) > _NAMED:
            named += f" (and {len(pairs) - _NAMED} more pairs)"
        raise AlmrrError(f"{what} in {earlier} and in {later}: {named}; {advice}.")
