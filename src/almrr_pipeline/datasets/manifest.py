"""Manifest of a category: its images with split, label, defect type and mask.

Building it opens every image once, so that a broken one is found before the training.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeVar

import pandas as pd

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import decode_image, decode_mask, read_bytes
from almrr_pipeline.common.progress import track

logger = logging.getLogger(__name__)

_OF_ITEM = ("image", "mask", "split", "label", "defect_type", "specimen")
COLUMNS = (*_OF_ITEM, "width", "height", "sha256")
_NAMED = 5
"""Files that a message names before it counts the rest."""
Split = Literal["train", "validation", "test"]
_Role = tuple[Split, Path, str]
"""Split, image, and what may be in one split alone."""
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Item:
    """An image and its role in the protocol; it has not been opened yet."""

    image: Path
    mask: Path | None
    """Ground truth; None for normal images, and for defective ones of a dataset without masks."""
    split: Split
    """Normal images of `validation` serve the thresholds alone; see `training_split`."""
    label: Literal["normal", "defective"]
    defect_type: str
    """`good` for normal images."""
    specimen: str = ""
    """Name of the specimen, where several images show the same one; these stay in one split."""


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


@dataclass(frozen=True)
class Inspection:
    """Properties of an image and its mask that are known after opening them."""

    width: int
    height: int
    sha256: str
    pixels: str
    """sha256 of the decoded image: equal for equal images in different formats."""
    mask_is_empty: bool


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
    items: Sequence[Item], *, root: Path, expected: Counts | None, strict: bool
) -> pd.DataFrame:
    """Open every image and mask once and list them.

    Args:
        items: a category's images, all under `root`.
        root: the data folder.
        expected: published numbers of images, if there are any.
        strict: refuse other numbers instead of warning.

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
    name = Path(common).name  # the category's folder
    if difference := check_counts(items, expected, name=name, strict=strict):
        logger.warning("%s", difference)
    inspections = inspect_items(items, root=root)
    rows, empty = [], []
    for item, found in zip(items, inspections, strict=True):
        paths = _relative(item.image, root), _relative(item.mask, root) if item.mask else ""
        values = item.split, item.label, item.defect_type, item.specimen
        rows.append((*paths, *values, found.width, found.height, found.sha256))
        if found.mask_is_empty:
            empty.append(item.image.name)
    if empty:
        logger.warning(
            "%s: the masks of %d defective images show no defect (%s): these count as defective "
            "images, but none of their pixels as anomalous",
            name,
            len(empty),
            ", ".join(empty[:_NAMED]),
        )
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values(["split", "image"], ignore_index=True)


def has_validation(manifest: pd.DataFrame) -> bool:
    """Whether the dataset has validation images of its own."""
    return bool((manifest["split"] == "validation").any())


def training_split(manifest: pd.DataFrame, *, fraction: float) -> tuple[list[str], list[str]]:
    """Split the normal images into those to train on and those for validation.

    The dataset's own validation images are used where there are any. Otherwise `split_validation`
    chooses whole specimens, or checksums where specimens are unknown: the choice does not depend on
    paths, and copies of an image stay on the same side.

    Args:
        manifest: from `build_manifest`.
        fraction: for validation, in [0, 0.5]; unused if the dataset has validation images.

    Returns:
        (training, validation): paths relative to the data folder, in the order of the manifest.
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


def check_images(paths: Sequence[Path], *, root: Path) -> None:
    """Decode images that belong to no protocol, such as textures; AlmrrError names broken ones."""
    _for_each(lambda path: decode_image(*_read(path, root)).shape, paths)


def inspect_items(items: Sequence[Item], *, root: Path) -> list[Inspection]:
    """Open every image and mask under `root`; raises what `build_manifest` raises for them."""
    inspections = _for_each(partial(_inspect, root=root), items)
    _refuse_leaks(items, inspections, root)
    return inspections


def _for_each(work: Callable[[_In], _Out], inputs: Sequence[_In]) -> list[_Out]:
    """Apply `work` in threads (decoding releases the GIL), and report all failures at once."""
    results, failures = [], []
    with (
        ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads,
        track(len(inputs), unit="images", description="check images") as advance,
    ):
        for future in [threads.submit(work, each) for each in inputs]:
            try:
                results.append(future.result())
            except AlmrrError as error:
                failures.append(str(error))
            advance(1)
    if failures:
        if len(failures) > _NAMED:
            failures[_NAMED:] = [f"And {len(failures) - _NAMED} more of this kind."]
        raise AlmrrError(" ".join(failures))
    return results


def _inspect(item: Item, root: Path) -> Inspection:
    try:
        str(item.image).encode("utf-8")
    except UnicodeEncodeError:
        message = f"{str(item.image)!r}: the name is not UTF-8 text; rename the file."
        raise AlmrrError(message) from None
    data, name = _read(item.image, root)
    pixels = decode_image(data, name)
    height, width = pixels.shape[:2]
    content = hashlib.sha256(f"{height} {width} ".encode() + pixels.tobytes()).hexdigest()
    is_empty = item.mask is not None and _is_empty_mask(item.mask, item.image, pixels.shape, root)
    return Inspection(width, height, hashlib.sha256(data).hexdigest(), content, is_empty)


def _read(path: Path, root: Path) -> tuple[bytes, Path]:
    name = path.relative_to(root)
    return read_bytes(path, name=name), name


def _is_empty_mask(path: Path, image: Path, shape: tuple[int, ...], root: Path) -> bool:
    name, image_name = _relative(path, root), _relative(image, root)
    if not path.is_file():
        missing = f"{image_name} is defective but has no mask: there is no {name}"
        raise AlmrrError(f"{missing}; add it, or remove the image.")
    mask = decode_mask(*_read(path, root))
    if mask.shape != shape[:2]:
        raise AlmrrError(
            f"{name} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {image_name} has "
            f"{shape[1]} x {shape[0]}; a mask has the size of its image."
        )
    return not mask.any()


def _refuse_leaks(items: Sequence[Item], inspections: Sequence[Inspection], root: Path) -> None:
    """Refuse an image, in any format, or a specimen that is in two splits."""
    pairs = zip(items, inspections, strict=True)
    images = [(item.split, item.image, found.pixels) for item, found in pairs]
    specimens = [(item.split, item.image, item.specimen) for item in items if item.specimen]
    _refuse_shared(images, root, "The same image is", "remove one of each pair")
    what, advice = "Images of the same specimen are", "keep each specimen in one split"
    _refuse_shared(specimens, root, what, advice)


def _refuse_shared(roles: Sequence[_Role], root: Path, what: str, advice: str) -> None:
    """Refuse what is in two splits."""
    for earlier, later in combinations(("train", "validation", "test"), 2):
        seen = {identity: image for split, image, identity in roles if split == earlier}
        leaks = [
            f"{_relative(seen[identity], root)} and {_relative(image, root)}"
            for split, image, identity in roles
            if split == later and identity in seen
        ]
        if leaks:
            pairs = "; ".join(leaks[:_NAMED])
            if len(leaks) > _NAMED:
                pairs += f" (and {len(leaks) - _NAMED} more pairs)"
            raise AlmrrError(f"{what} in {earlier} and in {later}: {pairs}; {advice}.")


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
