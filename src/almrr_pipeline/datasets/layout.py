"""MVTec AD's folder layout, used by many datasets: train/good, test/DEFECT, ground_truth/DEFECT.

Newer ones (MVTec LOCO AD, MVTec AD 2) also have validation/good, normal images not to train on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import list_folders
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.manifest import Item

GOOD = "good"
NORMAL_NAMES = (GOOD, "normal")
"""Names of a folder of normal images."""


def list_items(folder: Path) -> list[Item]:
    """Return all images of a folder of this layout, where each image has its split's folder."""
    normal = list_normal(folder / "train" / GOOD, "train")
    normal += list_normal(folder / "validation" / GOOD, "validation")
    return normal + list_test(folder / "test", folder / "ground_truth")


def list_normal(folder: Path, split: Literal["train", "validation"]) -> list[Item]:
    """Return the images directly in `folder` as normal images of a split."""
    return [Item(path, None, split, "normal", GOOD) for path in list_images(folder)]


def list_test(test: Path, masks: Path | None) -> list[Item]:
    """Return the test images: `test` contains `good` (or `normal`) and a folder per defect type.

    `masks`, None for a dataset without masks, contains DEFECT/STEM_mask or DEFECT/STEM; a missing
    mask is listed as well, so that `build_manifest` reports it.

    Raises:
        AlmrrError: there are images next to the folders, whose label is unknown.
    """
    if stray := list_images(test):
        advice = f"move it into {test / GOOD}, or into a folder named after its defect type"
        raise AlmrrError(f"{stray[0]} is next to the folders of {test}; {advice}.")
    items = []
    for folder in list_folders(test):
        for path in list_images(folder):
            if folder.name in NORMAL_NAMES:
                items.append(Item(path, None, "test", "normal", GOOD))
            else:
                mask = _find_mask(path, masks / folder.name) if masks else None
                items.append(Item(path, mask, "test", "defective", folder.name))
    return items


def _find_mask(image: Path, masks: Path) -> Path:
    """Return the mask of an image, or where it is expected."""
    usual = masks / f"{image.stem}_mask.png"
    if usual.is_file():
        return usual
    by_stem = {path.stem: path for path in list_images(masks)}
    return by_stem.get(f"{image.stem}_mask") or by_stem.get(image.stem) or usual
