"""MT-defect: magnetic tiles (Huang et al., The Visual Computer 2018)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder, list_folders
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.account import GOOD
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.manifest import Counts, Item, Split
from almrr_pipeline.datasets.obtain import Archive, ArchivedDataset
from almrr_pipeline.datasets.same_tile import group_by_tile
from almrr_pipeline.datasets.specimens import SPECIMENS_FILE, read_specimens, write_specimens

_BY_NAME, _BY_TILE, _PUBLISHED = "mt_defect", "mt_defect_tiles", "mt_defect_differnet"
_LIST = Path(__file__).with_name("mt_defect_differnet_train.txt")
"""Names of the training images as DifferNet's authors published them, one a line."""
_PREFIX = "MT_"
_FREE = "MT_Free"
_JPEG = (".jpg",)  # the images; the .png of the same name is the mask
_TRAIN = 761
"""Training images in the literature's most cited split, about 80 % of the 952 normal ones."""
_FILE = "Magnetic-tile-defect-datasets.-master.zip"
_ADDRESS = "https://codeload.github.com/abin24/Magnetic-tile-defect-datasets./zip/refs/heads/master"


class MtDefect(ArchivedDataset):
    """952 normal images and 392 of five defect types, gray and of many sizes.

    Category `mt_defect` trains on the 761 normal images whose file names have the lowest sha256,
    and tests on the other 191 and on all defective ones. Category `mt_defect_differnet` trains on
    those of the list that DifferNet's authors published (github.com/marco-rudolph/differnet,
    mtd_train_filenames.txt), which CS-Flow and PatchCore used too; the counts are the same.
    But each tile has about six images under different light, so that nearly every normal test
    image, and hardly a defective one, shows a tile of the training: recognizing tiles is enough.
    Category `mt_defect_tiles` keeps the images of a tile in one split, and those of a tile with a
    defect in the test; the counts are the same.
    """

    name = "mt_defect"
    counts = dict.fromkeys((_BY_NAME, _BY_TILE, _PUBLISHED), Counts(_TRAIN, 952 - _TRAIN, 392))
    archive = Archive(name, _FILE, (_ADDRESS,))
    license = (
        "Magnetic tile defects: no license is stated, the authors welcome its use; cite Huang, Qiu "
        "and Yuan, Surface defect saliency of magnetic tile, The Visual Computer, 2018."
    )

    def extract(self, category: str, folder: Path) -> list[Path]:
        """Return the folders MT_*, each with its Imgs."""
        found = find_folder(folder, _FREE)
        if found is None:
            raise AlmrrError(f"there is no folder {_FREE} in it")
        return [each for each in list_folders(found) if each.name.startswith(_PREFIX)]

    def verify(self, category: str, target: Path, request: FetchRequest) -> None:
        """Find the images of each tile, if the category needs them, and compare the counts."""
        if category == _BY_TILE:
            images = list(_list_images(target))
            groups = group_by_tile(images)
            tiles = {path: images[first].stem for path, first in zip(images, groups, strict=True)}
            write_specimens(target, tiles)
        super().verify(category, target, request)

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the split by list, or by hash of the file name or tile; normal images: no mask."""
        images = _list_images(folder)
        tiles = read_specimens(folder, images) if category == _BY_TILE else {}
        if category == _BY_TILE and not tiles:
            raise AlmrrError(f"{folder} holds no {SPECIMENS_FILE}; fetch {_BY_TILE} again.")
        normal = {path: tiles.get(path, path.name) for path in images if images[path] == GOOD}
        if category == _PUBLISHED:
            listed = set(_LIST.read_text(encoding="utf-8").split())
            chosen = {path for path in normal if path.name in listed}
        else:
            chosen = _choose_training(normal, {tiles.get(path) for path in images.keys() - normal})
        items = []
        for path, defect_type in images.items():
            tile = tiles.get(path, "")
            if path in normal:
                split: Split = "train" if path in chosen else "test"
                items.append(Item(path, None, split, "normal", GOOD, tile))
            else:
                mask = path.with_suffix(".png")
                items.append(Item(path, mask, "test", "defective", defect_type, tile))
        return items


def _list_images(folder: Path) -> dict[Path, str]:
    """Return all images and their defect types, normal ones first."""
    folders = [each for each in list_folders(folder) if each.name.startswith(_PREFIX)]
    return {
        path: GOOD if each.name == _FREE else each.name.removeprefix(_PREFIX).lower()
        for each in sorted(folders, key=lambda each: each.name != _FREE)
        for path in list_images(each / "Imgs", _JPEG)
    }


def _choose_training(names: Mapping[Path, str], tested: Set[str | None]) -> set[Path]:
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
