"""MT-defect: magnetic tiles (Huang et al., The Visual Computer 2018)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder, list_folders
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.folder import GOOD
from almrr_pipeline.datasets.manifest import Counts, Item, Split
from almrr_pipeline.datasets.obtain import Archive, ArchivedDataset
from almrr_pipeline.datasets.same_tile import group_by_tile
from almrr_pipeline.datasets.specimens import SPECIMENS_FILE, read_specimens, write_specimens

_BY_NAME, _BY_TILE = "mt_defect", "mt_defect_tiles"
_PREFIX = "MT_"
_FREE = "MT_Free"
_JPEG = (".jpg",)
"""The images; the .png of the same name is the mask."""
_TRAIN = 761
"""Training images in the literature's most cited split, about 80 % of the 952 normal ones."""
_FILE = "Magnetic-tile-defect-datasets.-master.zip"
_ADDRESS = "https://codeload.github.com/abin24/Magnetic-tile-defect-datasets./zip/refs/heads/master"


class MtDefect(ArchivedDataset):
    """952 normal images and 392 of five defect types, gray and of many sizes.

    Only the counts of the split are published. Category `mt_defect` trains on the 761 normal images
    whose file names have the lowest sha256, and tests on the other 191 and on all defective ones.
    But each tile has about six images under different light, so that nearly every normal test
    image, and hardly a defective one, shows a tile of the training: recognizing tiles is enough.
    Category `mt_defect_tiles` keeps the images of a tile in one split, and those of a tile with a
    defect in the test; the counts are the same.
    """

    name = "mt_defect"
    counts = dict.fromkeys((_BY_NAME, _BY_TILE), Counts(_TRAIN, 952 - _TRAIN, 392))
    license = (
        "Magnetic tile defects: no license is stated, the authors welcome its use; cite Huang, Qiu "
        "and Yuan, Surface defect saliency of magnetic tile, The Visual Computer, 2018."
    )

    def archives(self, category: str) -> tuple[Archive]:
        """Return the one archive."""
        return (Archive(self.name, _FILE, (_ADDRESS,)),)

    def extract(self, category: str, folder: Path) -> list[Path]:
        """Return the folders MT_*, each with its Imgs."""
        found = find_folder(folder, _FREE)
        if found is None:
            raise AlmrrError(f"there is no folder {_FREE} in it")
        return [each for each in list_folders(found) if each.name.startswith(_PREFIX)]

    def verify(self, category: str, target: Path, request: FetchRequest) -> None:
        """Find the images of each tile, if the category needs them, and compare the counts."""
        if category == _BY_TILE:
            write_specimens(target, _find_tiles(target))
        super().verify(category, target, request)

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the split by hash of the file name or of the tile; normal images have no mask."""
        normal, defective = list_images(folder / _FREE / "Imgs", _JPEG), _list_defective(folder)
        tiles = read_specimens(folder) if category == _BY_TILE else {}
        if category == _BY_TILE and not tiles:
            raise AlmrrError(f"{folder} holds no {SPECIMENS_FILE}; fetch {_BY_TILE} again.")
        tested = {tiles[path] for path in defective} if tiles else set()
        chosen = _choose_training({path: tiles.get(path, path.name) for path in normal}, tested)
        items = []
        for path in normal:
            split: Split = "train" if path in chosen else "test"
            items.append(Item(path, None, split, "normal", GOOD, tiles.get(path, "")))
        for path, defect_type in defective.items():
            mask, tile = path.with_suffix(".png"), tiles.get(path, "")
            items.append(Item(path, mask, "test", "defective", defect_type, tile))
        return items


def _list_defective(folder: Path) -> dict[Path, str]:
    """Return the images with a defect, and their defect types."""
    return {
        path: each.name.removeprefix(_PREFIX).lower()
        for each in list_folders(folder)
        if each.name != _FREE and each.name.startswith(_PREFIX)
        for path in list_images(each / "Imgs", _JPEG)
    }


def _choose_training(names: Mapping[Path, str], tested: set[str]) -> set[Path]:
    """Choose all images of a name, in the order of its hash, up to the number for training."""
    images: dict[str, list[Path]] = {}
    for path, name in names.items():
        if name not in tested:
            images.setdefault(name, []).append(path)
    chosen: set[Path] = set()
    for name in sorted(images, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(chosen) + len(images[name]) <= _TRAIN:
            chosen.update(images[name])
    return chosen


def _find_tiles(folder: Path) -> dict[Path, str]:
    """Name each image's tile after the first image of it."""
    images = [*list_images(folder / _FREE / "Imgs", _JPEG), *_list_defective(folder)]
    groups = group_by_tile(images)
    return {image: images[first].stem for image, first in zip(images, groups, strict=True)}
