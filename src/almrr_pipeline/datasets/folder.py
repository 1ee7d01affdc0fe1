"""The user's own images: `folder_NAME`, from the folder or archive at `data.paths.folder_NAME`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder, list_folders
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.layout import NORMAL_NAMES, list_normal, list_test
from almrr_pipeline.datasets.manifest import Item
from almrr_pipeline.datasets.obtain import Archive, ArchivedDataset, DownloadSpec
from almrr_pipeline.datasets.specimens import SPECIMENS_FILE, read_specimens

PREFIX = "folder_"
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
    categories = ()
    license = "Images of your own: their terms are yours."

    def spec(self, category: str) -> DownloadSpec:
        """Return the archive's name in a mirror; there is no public address."""
        return DownloadSpec(category, category, (Archive(category, f"{category}.zip", ()),))

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
        ground_truth = folder / masks if (folder / masks).is_dir() else None
        items = [
            *list_normal(_normal_folder(folder / train), "train"),
            *_list_validation(folder / "validation"),
            *list_test(folder / "test", ground_truth),
        ]
        specimens = read_specimens(folder)
        return [replace(item, specimen=specimens.get(item.image, "")) for item in items]

    def expected(self, category: str) -> None:
        """Return None: there are no published numbers."""


def _list_validation(validation: Path) -> list[Item]:
    """List the validation images, if there is a folder of them; it may not be empty."""
    items = list_normal(_normal_folder(validation), "validation")
    if validation.is_dir() and not items:
        raise AlmrrError(f"{validation} holds no image; put normal ones into it, or remove it.")
    return items


def _normal_folder(folder: Path) -> Path:
    """Return the folder that contains the normal images: its `good`, its `normal`, or itself."""
    folders = list_folders(folder)
    odd = [inner for inner in folders if inner.name not in NORMAL_NAMES]
    if odd or (folders and list_images(folder)):
        where = odd[0] if odd else folder
        rule = "training and validation images are normal ones alone, in one folder"
        raise AlmrrError(f"{where}: {rule}; move defective ones to test/DEFECT.")
    return folders[0] if folders else folder
