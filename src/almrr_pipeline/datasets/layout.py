"""MVTec AD's folder layout, which many data sets and users follow: train/good, test/DEFECT, ground_truth/DEFECT.

Younger sets (MVTec LOCO AD, MVTec AD 2) have validation/good too, normal images that are not for training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import list_folders
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.manifest import Item

GOOD = "good"
_NORMAL_NAMES = (GOOD, "normal")


def list_normal(folder: Path, split: Literal["train", "validation"]) -> list[Item]:
    """Return the images directly in `folder` as normal images of a split."""
    return [Item(path, None, split, "normal", GOOD) for path in list_images(folder)]


def list_test(test: Path, masks: Path | None) -> list[Item]:
    """Return the test images: `good` (or `normal`) and one folder for each defect type.

    A defect's mask lies in a folder of the defect's name under `masks` and is called STEM_mask or STEM; an absent one
    is named as well, so that it will be missed. None for a data set without masks.

    Raises:
        AlmrrError: images lie beside the folders, so that nobody knows what they show.
    """
    if stray := list_images(test):
        raise AlmrrError(
            f"{stray[0]} lies beside the folders of {test}; put it into {test / GOOD}, or into a folder named after "
            "its defect type."
        )
    items = []
    for folder in list_folders(test):
        for path in list_images(folder):
            if folder.name in _NORMAL_NAMES:
                items.append(Item(path, None, "test", "normal", GOOD))
            else:
                mask = _find_mask(path, masks / folder.name) if masks else None
                items.append(Item(path, mask, "test", "defective", folder.name))
    return items


def _find_mask(image: Path, masks: Path) -> Path:
    """Return the mask of an image, or where it ought to be."""
    usual = masks / f"{image.stem}_mask.png"
    if usual.is_file():
        return usual
    named = {path.stem: path for path in list_images(masks)}
    return named.get(f"{image.stem}_mask") or named.get(image.stem) or usual
