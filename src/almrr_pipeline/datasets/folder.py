"""MVTec AD's folder layout, used by many datasets, and the user's own images in it or a flat one.

Newer ones (MVTec LOCO AD, MVTec AD 2) also have validation/good, normal images not to train on.
specimens.csv, next to the folders of images, tells which show the same specimen, so that none is
trained on and tested: its columns are `image`, a path relative to the file, and `specimen`, any
name. An image that is not listed is a specimen of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pandas as pd

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder, list_folders
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.manifest import Item
from almrr_pipeline.datasets.obtain import Archive, ArchivedDataset

PREFIX = "folder_"
GOOD = "good"
SPECIMENS_FILE = "specimens.csv"
_COLUMNS = ("image", "specimen")
_NORMAL_NAMES = (GOOD, "normal")  # names of a folder of normal images
_LAYOUTS = (("train", "ground_truth"), ("normal", "masks"))
"""Folder of the training images and folder of the masks."""
_EXPECTED = (
    "expected is MVTec AD's layout (train/good, validation/good, test/good, test/DEFECT, "
    "ground_truth/DEFECT/STEM_mask.png) or the flat one (normal, validation, test/good, "
    "test/DEFECT, masks/DEFECT/STEM.png), where all but the first may be missing"
)


class Folder(ArchivedDataset):
    """Any number of categories folder_NAME; masks, specimens.csv and the test set are optional."""

    name = "folder"
    license = "Images of your own: their terms are yours."

    def archives(self, category: str) -> tuple[Archive]:
        """Return the archive's name in a mirror; there is no public address."""
        return (Archive(category, f"{category}.zip", ()),)

    def extract(self, category: str, folder: Path) -> list[Path]:
        """Return the folders of images and masks, and specimens.csv."""
        for train, masks in _LAYOUTS:
            found = find_folder(folder, train, depth=2)
            if found is not None:
                names = (train, "validation", "test", masks, SPECIMENS_FILE)
                return [found / name for name in names if (found / name).exists()]
        raise AlmrrError(f"there is neither a folder train nor a folder normal in it; {_EXPECTED}")

    def check(self, category: str, request: FetchRequest) -> None:
        """Raise AlmrrError if there is no data.paths.folder_NAME."""
        if category not in request.settings.paths:
            setting = f"data.paths.{category}: PATH"
            raise AlmrrError(f"{category}: set the path of its images: {setting}.")

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the folder's own split; defective images need masks if there is a mask folder."""
        train, masks = _LAYOUTS[0] if (folder / "train").is_dir() else _LAYOUTS[1]
        items = list_items(folder, train, masks if (folder / masks).is_dir() else None)
        specimens = read_specimens(folder)
        return [replace(item, specimen=specimens.get(item.image, "")) for item in items]


def list_items(
    folder: Path, train: str = "train", masks: str | None = "ground_truth"
) -> list[Item]:
    """Return all images of a folder of this layout, where each image has its split's folder.

    `test` contains `good` (or `normal`) and a folder per defect type. `masks`, None for a dataset
    without masks, contains DEFECT/STEM_mask or DEFECT/STEM; a missing mask is listed as well, so
    that `build_manifest` reports it.

    Raises:
        AlmrrError: an image's label is unknown, or the folder of validation images is empty.
    """
    items = list_normal(_normal_folder(folder / train), "train")
    validation = list_normal(_normal_folder(folder / "validation"), "validation")
    if (folder / "validation").is_dir() and not validation:
        advice = "put normal ones into it, or remove it"
        raise AlmrrError(f"{folder / 'validation'} holds no image; {advice}.")
    items += validation
    test = folder / "test"
    if stray := list_images(test):
        advice = f"move it into {test / GOOD}, or into a folder named after its defect type"
        raise AlmrrError(f"{stray[0]} is next to the folders of {test}; {advice}.")
    for inner in list_folders(test):
        if inner.name in _NORMAL_NAMES:
            items += list_normal(inner, "test")
            continue
        for path in list_images(inner):
            mask = _find_mask(path, folder / masks / inner.name) if masks else None
            items.append(Item(path, mask, "test", "defective", inner.name))
    return items


def list_normal(folder: Path, split: Literal["train", "validation", "test"]) -> list[Item]:
    """Return the images directly in `folder` as normal images of a split."""
    return [Item(path, None, split, "normal", GOOD) for path in list_images(folder)]


def _normal_folder(folder: Path) -> Path:
    """Return the folder that contains the normal images: its `good`, its `normal`, or itself."""
    folders = [inner for inner in list_folders(folder) if list_images(inner)]
    odd = [inner for inner in folders if inner.name not in _NORMAL_NAMES]
    if odd or len(folders) > 1 or (folders and list_images(folder)):
        where = odd[0] if odd else folder
        rule = "training and validation images are normal ones alone, in one folder"
        raise AlmrrError(f"{where}: {rule}; move defective ones to test/DEFECT.")
    return folders[0] if folders else folder


def _find_mask(image: Path, masks: Path) -> Path:
    """Return the mask of an image, or where it is expected."""
    usual = masks / f"{image.stem}_mask.png"
    if usual.is_file():
        return usual
    by_stem = {path.stem: path for path in list_images(masks)}
    return by_stem.get(f"{image.stem}_mask") or by_stem.get(image.stem) or usual


def write_specimens(folder: Path, specimens: Mapping[Path, str]) -> None:
    """Write specimens.csv into `folder`, which contains the images."""
    rows = [(image.relative_to(folder).as_posix(), name) for image, name in specimens.items()]
    pd.DataFrame(rows, columns=list(_COLUMNS)).to_csv(folder / SPECIMENS_FILE, index=False)


def read_specimens(folder: Path) -> dict[Path, str]:
    """Read specimens.csv from `folder`.

    Returns:
        The specimen of each listed image; empty where there is no such file.

    Raises:
        AlmrrError: the file cannot be read or lacks a column; or a line names an absent image, no
            specimen, or another specimen than an earlier line.
    """
    path = folder / SPECIMENS_FILE
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True
        )
    except ValueError as error:  # includes pandas' parser errors and UnicodeDecodeError
        problem = f"cannot be read ({' '.join(str(error).split())})"
        advice = "save it as comma-separated UTF-8 text"
        raise AlmrrError(f"{SPECIMENS_FILE} {problem}; {advice}.") from error
    if not set(_COLUMNS) <= set(table.columns):
        found, needed = ", ".join(map(str, table.columns)), " and ".join(_COLUMNS)
        raise AlmrrError(f"{SPECIMENS_FILE} has the columns {found}; it needs {needed}.")
    specimens: dict[Path, str] = {}
    rows = zip(table["image"], table["specimen"], strict=True)
    for line, (name, specimen) in enumerate(rows, start=2):
        image, problem = folder / name.replace("\\", "/"), ""
        if not image.is_file():
            problem = f"there is no image {name}; paths are relative to {SPECIMENS_FILE}"
        elif not specimen:
            problem = f"{name} has no specimen; name one, or remove the line"
        elif (known := specimens.setdefault(image, specimen)) != specimen:
            problem = f"{name} has two specimens, {known} and {specimen}; keep one"
        if problem:
            raise AlmrrError(f"{SPECIMENS_FILE}, line {line}: {problem}.")
    return specimens
