"""A user's own images: `folder_NAME`, from the folder or archive that `data.source.folder_NAME` names."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder, list_folders, transfer
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.layout import GOOD, list_normal, list_test
from almrr_pipeline.datasets.manifest import Item
from almrr_pipeline.datasets.obtain import Archive, DownloadSpec, obtain
from almrr_pipeline.datasets.specimens import PARTS_FILE, read_parts
from almrr_pipeline.datasets.base import FetchRequest, Source

logger = logging.getLogger(__name__)

PREFIX = "folder_"
_LAYOUT = (
    "expected is MVTec AD's layout (train/good, validation/good, test/good, test/DEFECT, "
    "ground_truth/DEFECT/STEM_mask.png) or the flat one (normal, validation, test/good, test/DEFECT, "
    "masks/DEFECT/STEM.png), where all but the first may be missing"
)
_LAYOUTS = (("train", "ground_truth"), ("normal", "masks"))
"""Folder of the training images and folder of the masks."""


class Folder(Source):
    """Any number of categories, each called folder_NAME; masks, specimens.csv and the test set itself are optional."""

    name = "folder"
    categories = ()
    license = "Images of your own: their terms are yours."

    def fetch(self, category: str, *, target: Path, request: FetchRequest) -> None:
        """Fill `target` with the folder's training images, test images and masks."""
        self.check(category, request)

        def take(folder: Path, is_ours: bool) -> None:
            for train, masks in _LAYOUTS:
                found = find_folder(folder, train, depth=2)
                if found is not None:
                    taken = [found / name for name in (train, "validation", "test", masks) if (found / name).is_dir()]
                    if (found / PARTS_FILE).is_file():
                        taken.append(found / PARTS_FILE)
                    return transfer(taken, target, move=is_ours)
            raise AlmrrError(f"there is neither a folder train nor a folder normal in it; {_LAYOUT}")

        offer = DownloadSpec(category, category, (Archive(category, f"{category}.zip", ()),))
        obtain(offer, target=target, request=request, take=take)
        self.items(category, target)

    def check(self, category: str, request: FetchRequest) -> None:
        """Make sure that the user said where the images lie.

        Raises:
            AlmrrError: there is no data.source.folder_NAME.
        """
        if category not in request.local:
            raise AlmrrError(f"{category}: say where its images lie: data.source.{category}: PATH.")

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the folder's own split; defective images have masks as soon as there is a folder of masks."""
        train, masks = _LAYOUTS[0] if (folder / "train").is_dir() else _LAYOUTS[1]
        normal = list_normal(_normal_folder(folder / train), "train")
        ground_truth = folder / masks
        tested = list_test(folder / "test", ground_truth if ground_truth.is_dir() else None)
        parts = read_parts(folder)
        items = normal + _list_validation(folder / "validation") + tested
        return [replace(item, part=parts.get(item.image, "")) for item in items]

    def expected(self, category: str) -> None:
        """Nobody published how many images you have."""


def _list_validation(validation: Path) -> list[Item]:
    """List the images that thresholds are to be taken from, if there is a folder of them; it may not be empty."""
    items = list_normal(_normal_folder(validation), "validation")
    if validation.is_dir() and not items:
        raise AlmrrError(f"{validation} holds no image; put normal ones into it, or remove it.")
    return items


def _normal_folder(folder: Path) -> Path:
    """Return where the normal images of train, normal or validation lie: in its good, its normal, or itself."""
    folders = list_folders(folder)
    odd = [inner for inner in folders if inner.name not in {GOOD, "normal"}]
    if odd or (folders and list_images(folder)):
        where = odd[0] if odd else folder
        raise AlmrrError(
            f"{where}: training and validation images are normal ones alone, in one folder; move defective ones to "
            "test/DEFECT."
        )
    return folders[0] if folders else folder
