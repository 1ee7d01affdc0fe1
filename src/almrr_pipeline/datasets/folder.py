"""MVTec AD's folder layout, used by many datasets, and the user's own images in it or a flat one.

Newer ones (MVTec LOCO AD, MVTec AD 2) also have validation/good, normal images not to train on.
Names of folders are compared without case; see `inspect_folder` for what is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.account import GOOD, FolderAccount, inspect_folder
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.manifest import Item, Split
from almrr_pipeline.datasets.obtain import Archive, ArchivedDataset

PREFIX = "folder_"


class Folder(ArchivedDataset):
    """Any number of categories folder_NAME; masks, specimens.csv and the test set are optional."""

    name = "folder"
    license = "Images of your own: their terms are yours."

    def __init__(self, normal_names: Sequence[str] | None = None, *, strict: bool = False) -> None:
        self._normal_names, self._strict = normal_names, strict

    def archives(self, category: str) -> tuple[Archive]:
        """Return the archive's name in a mirror; there is no public address."""
        return (Archive(category, f"{category}.zip", ()),)

    def extract(self, category: str, folder: Path) -> list[Path]:
        """Return the folders of images and masks, and specimens.csv; report what is not used."""
        account = self._inspect(folder)
        account.check(name=category, strict=self._strict)
        return list(account.used_folders)

    def check(self, category: str, request: FetchRequest) -> None:
        """Raise AlmrrError if there is no data.paths.folder_NAME."""
        if category not in request.settings.paths:
            setting = f"data.paths.{category}: PATH"
            raise AlmrrError(f"{category}: set the path of its images: {setting}.")

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the folder's own split; defective images need masks if there is a mask folder."""
        return _require(self._inspect(folder))

    def _inspect(self, folder: Path) -> FolderAccount:
        return inspect_folder(folder, normal_names=self._normal_names)


def list_items(folder: Path) -> list[Item]:
    """Return all images of a folder of MVTec AD's layout, each with its split.

    Each defective image has a mask; a missing one is listed too, so that `build_manifest` reports
    it. AlmrrError if an image's label is unknown, or the folder of validation images is empty.
    """
    return _require(inspect_folder(folder, needs_masks=True))


def list_normal(folder: Path, split: Split) -> list[Item]:
    """Return the images directly in `folder` as normal images of a split."""
    return [Item(path, None, split, "normal", GOOD) for path in list_images(folder)]


def _require(account: FolderAccount) -> list[Item]:
    if errors := account.sentences("error"):
        raise AlmrrError(". ".join(errors) + ".")
    return list(account.items)
