"""The list of a category's images: which is trained on, which is tested, and where its ground truth lies.

Making the list opens every image once, so that a broken one is found before hours of training.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeVar

import pandas as pd

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import decode_image, decode_mask
from almrr_pipeline.common.progress import track

logger = logging.getLogger(__name__)

COLUMNS = ("image", "mask", "split", "label", "defect", "part", "width", "height", "sha256")
_SHOWN = 5
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Item:
    """One image and its part in the protocol; nothing has been opened yet."""

    image: Path
    mask: Path | None
    """Ground truth; None for normal images, and for defective ones of a data set without masks."""
    split: Literal["train", "validation", "test"]
    """Normal images of `validation` are for the thresholds alone; see `training_split`."""
    label: Literal["normal", "defective"]
    defect: str
    """Kind of defect; `good` for normal images."""
    part: str = ""
    """Name of the piece that the image shows, where several show the same one; these are held out together."""


@dataclass(frozen=True)
class Counts:
    """How many images a data set is published with."""

    train: int
    test_normal: int
    test_defective: int
    validation: int = 0


@dataclass(frozen=True)
class _Inspection:
    """What opening an image and its mask has shown."""

    width: int
    height: int
    sha256: str
    pixels: str
    """sha256 of the decoded image: equal for equal images, however they were saved."""
    mask_is_empty: bool


def count_items(items: Iterable[Item]) -> Counts:
    """Count a list of images as data sets are published."""
    kinds = [(item.split, item.label) for item in items]
    return Counts(
        train=sum(split == "train" for split, _ in kinds),
        test_normal=kinds.count(("test", "normal")),
        test_defective=kinds.count(("test", "defective")),
        validation=sum(split == "validation" for split, _ in kinds),
    )


def check_counts(items: Sequence[Item], expected: Counts | None, *, name: str, strict: bool) -> None:
    """Compare the numbers of images with the published ones; a difference is refused where `strict`.

    Raises:
        AlmrrError: there is nothing to train on, or the numbers differ and `strict` is set.
    """
    found = count_items(items)
    if not found.train:
        raise AlmrrError(f"{name}: there is no normal image to train on; check the folder that it was taken from.")
    if strict and expected and found != expected:
        raise AlmrrError(f"{_difference(found, expected, name)}. Fetch it again, or set data.strict to false.")


def _difference(found: Counts, expected: Counts, name: str) -> str:
    return f"{name}: {_say_counts(found)}; published are {_say_counts(expected)}"


def _say_counts(counts: Counts) -> str:
    validation = f"{counts.validation} validation, " if counts.validation else ""
    return (
        f"{counts.train} training, {validation}{counts.test_normal} normal and {counts.test_defective} defective test "
        "images"
    )


def check_items(items: Sequence[Item], *, root: Path) -> None:
    """Open every image and mask, as `build_manifest` does, but list nothing.

    Raises:
        AlmrrError: as for `build_manifest`; files are named by their paths relative to `root`.
    """
    _inspect_all(items, root, description="check images")


def build_manifest(items: Sequence[Item], *, root: Path, expected: Counts | None, strict: bool) -> pd.DataFrame:
    """Open every image and mask once and list them.

    Args:
        items: a category's images, all under `root`.
        root: the data folder; paths in the list are relative to it, with forward slashes.
        expected: published numbers of images, if there are any.
        strict: refuse other numbers instead of warning.

    Returns:
        One row an image, sorted by split and image: image, mask ("" where there is none), split (train,
        validation or test), label (normal or defective), defect, part ("" where no two images show the same piece),
        width and height in pixels (upright), sha256 of the file.

    Raises:
        AlmrrError: no training images, an image that cannot be decoded, a mask that is missing or of another size
            than its image, a name that is not UTF-8, or the same image or part in two splits; names the files.
    """
    name = _common_folder([item.image for item in items], root)
    check_counts(items, expected, name=name, strict=strict)
    if expected and (found := count_items(items)) != expected:
        logger.warning("%s", _difference(found, expected, name))
    inspections = _inspect_all(items, root, description=f"list {name}")
    _report_empty_masks(items, inspections, name)
    rows = [
        {
            "image": _relative(item.image, root),
            "mask": _relative(item.mask, root) if item.mask else "",
            "split": item.split,
            "label": item.label,
            "defect": item.defect,
            "part": item.part,
            "width": found.width,
            "height": found.height,
            "sha256": found.sha256,
        }
        for item, found in zip(items, inspections, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS)).sort_values(["split", "image"], ignore_index=True)


def has_validation(manifest: pd.DataFrame) -> bool:
    """Whether the data set has validation images of its own, normal ones that are not for training."""
    return bool((manifest["split"] == "validation").any())


def training_split(manifest: pd.DataFrame, *, fraction: float) -> tuple[list[str], list[str]]:
    """Divide the normal training images of a manifest into those to train on and those held out for the thresholds.

    Where the data set has validation images of its own, these are held out and no others. Else the choice goes by
    the images' parts where those are known, and by their checksums where not: it depends neither on where they lie
    nor on what they are called, and images of one part, or copies of one, stay on the same side.

    Args:
        manifest: what `build_manifest` returned.
        fraction: share to hold out, in [0, 0.5]; without effect where there are validation images.

    Returns:
        (training, held out): paths relative to the data folder, each in the order of the manifest.
    """
    normal = manifest[(manifest["split"] == "train") & (manifest["label"] == "normal")]
    if has_validation(manifest):
        return normal["image"].tolist(), manifest.loc[manifest["split"] == "validation", "image"].tolist()
    kept_together = normal["part"].where(normal["part"] != "", normal["sha256"])
    _, validation = split_validation(list(dict.fromkeys(kept_together)), fraction)
    is_validation = kept_together.isin(validation)
    return normal.loc[~is_validation, "image"].tolist(), normal.loc[is_validation, "image"].tolist()


def split_validation(names: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Hold out a part of the normal training images: those whose names have the lowest sha256.

    The choice depends on nothing but the names, and one image more or less changes it by at most one or two.

    Args:
        names: names or paths, all different.
        fraction: share to hold out, in [0, 0.5].

    Returns:
        (training, held out), each in the order of `names`. At least one is held out where `fraction` is above 0 and
        there are two or more.
    """
    count = max(1, round(fraction * len(names))) if fraction > 0 and len(names) > 1 else 0
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    validation = set(ranked[:count])
    return [name for name in names if name not in validation], [name for name in names if name in validation]


def check_images(paths: Sequence[Path], *, root: Path) -> None:
    """Decode images that belong to no protocol, such as textures.

    Raises:
        AlmrrError: some cannot be decoded; names them by their paths relative to `root`.
    """
    _for_each(lambda path: decode_image(_read(path, root), path.relative_to(root)).shape, paths, "check images")


def _inspect_all(items: Sequence[Item], root: Path, description: str) -> list[_Inspection]:
    inspections = _for_each(partial(_inspect, root=root), items, description)
    _refuse_leaks(items, inspections, root)
    return inspections


def _for_each(work: Callable[[_In], _Out], inputs: Sequence[_In], description: str) -> list[_Out]:
    """Do work on all inputs in threads (decoding releases Python's lock), and report all failures at once."""
    results, complaints = [], []

    def attempt(each: _In) -> _Out | AlmrrError:
        try:
            return work(each)
        except AlmrrError as error:
            return error

    with (
        ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads,
        track(len(inputs), unit="images", description=description) as advance,
    ):
        for result in threads.map(attempt, inputs):
            advance(1)
            if isinstance(result, AlmrrError):
                complaints.append(str(result))
            else:
                results.append(result)
    if complaints:
        more = f" And {len(complaints) - _SHOWN} more of this kind." if len(complaints) > _SHOWN else ""
        raise AlmrrError(" ".join(complaints[:_SHOWN]) + more)
    return results


def _inspect(item: Item, root: Path) -> _Inspection:
    _check_name(item.image)
    data = _read(item.image, root)
    pixels = decode_image(data, item.image.relative_to(root))
    height, width = pixels.shape[:2]
    return _Inspection(
        width=width,
        height=height,
        sha256=hashlib.sha256(data).hexdigest(),
        pixels=hashlib.sha256(f"{height} {width} ".encode() + pixels.tobytes()).hexdigest(),
        mask_is_empty=item.mask is not None and not _mask_has_defect(item.mask, item.image, (height, width), root),
    )


def _read(path: Path, root: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        name = _relative(path, root)
        raise AlmrrError(f"{name} cannot be read ({error.strerror}); replace or remove it.") from error


def _mask_has_defect(path: Path, image: Path, size: tuple[int, int], root: Path) -> bool:
    name, image_name = _relative(path, root), _relative(image, root)
    if not path.is_file():
        raise AlmrrError(f"{image_name} is defective but has no mask: there is no {name}; add it, or remove the image.")
    mask = decode_mask(_read(path, root), path.relative_to(root))
    if mask.shape != size:
        raise AlmrrError(
            f"{name} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {image_name} has {size[1]} x {size[0]}; "
            "a mask has the size of its image."
        )
    return bool(mask.any())


def _check_name(path: Path) -> None:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise AlmrrError(f"{str(path)!r}: the name is not UTF-8 text; rename the file.") from None


def _refuse_leaks(items: Sequence[Item], inspections: Sequence[_Inspection], root: Path) -> None:
    """No image and no part may be in two splits, under whatever name or format: what is tested was not trained on."""
    images = [(item.split, item.image, found.pixels) for item, found in zip(items, inspections, strict=True)]
    parts = [(item.split, item.image, item.part) for item in items if item.part]
    _refuse_shared(images, root, what="The same image is", remedy="remove one of each pair")
    _refuse_shared(parts, root, what="Images of the same part are", remedy="keep each part on one side")


def _refuse_shared(identities: Sequence[tuple[str, Path, str]], root: Path, *, what: str, remedy: str) -> None:
    """Refuse what is in two splits; given are split, image, and what is equal where it should not be."""
    for earlier, later in combinations(("train", "validation", "test"), 2):
        seen = {identity: image for split, image, identity in identities if split == earlier}
        leaks = [
            f"{_relative(seen[identity], root)} and {_relative(image, root)}"
            for split, image, identity in identities
            if split == later and identity in seen
        ]
        if leaks:
            more = f" (and {len(leaks) - _SHOWN} more pairs)" if len(leaks) > _SHOWN else ""
            raise AlmrrError(f"{what} in {earlier} and in {later}: {'; '.join(leaks[:_SHOWN])}{more}; {remedy}.")


def _report_empty_masks(items: Sequence[Item], inspections: Sequence[_Inspection], name: str) -> None:
    empty = [item.image.name for item, found in zip(items, inspections, strict=True) if found.mask_is_empty]
    if empty:
        logger.warning(
            "%s: the masks of %d defective images show no defect (%s): these count as defective images, but no "
            "pixel of theirs does",
            name,
            len(empty),
            ", ".join(empty[:_SHOWN]),
        )


def _common_folder(paths: Sequence[Path], root: Path) -> str:
    """Name what the images have in common, which is their category's folder."""
    common = Path(os.path.commonpath([path.parent for path in paths])) if paths else root
    return common.name


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
