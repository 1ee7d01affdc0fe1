"""Magnetic tile defects (Huang, Qiu, Yuan: Surface defect saliency of magnetic tile, The Visual Computer 2018)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder, list_folders, transfer
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.layout import GOOD
from almrr_pipeline.datasets.manifest import Counts, Item, check_counts
from almrr_pipeline.datasets.obtain import Archive, DownloadSpec, obtain
from almrr_pipeline.datasets.specimens import PARTS_FILE, read_parts, write_parts
from almrr_pipeline.datasets.same_tile import group_by_tile
from almrr_pipeline.datasets.base import FetchRequest, Source

logger = logging.getLogger(__name__)

_BY_NAME, _BY_TILE = "mt_defect", "mt_defect_tiles"
_PREFIX = "MT_"
_FREE = "MT_Free"
_TRAIN = 761
"""Training images in the literature's most cited split, about 80 % of the 952 free ones."""
_OFFER = DownloadSpec(
    "mt_defect",
    "mt_defect",
    (
        Archive(
            "mt_defect",
            "Magnetic-tile-defect-datasets.-master.zip",
            ("https://codeload.github.com/abin24/Magnetic-tile-defect-datasets./zip/refs/heads/master",),
        ),
    ),
)


class MtDefect(Source):
    """952 images of free tiles and 392 of five defect types, gray and of many sizes.

    Nobody published a split, only its counts. Category `mt_defect` trains on the 761 free images whose file names
    have the lowest sha256 and tests on the other 191 and on all defective ones: the counts of the literature, chosen by
    no one. But a tile was photographed about six times, under different light, so nearly every free test image has a
    twin in training and hardly a defective one has: to recognize the tile is enough. Category `mt_defect_tiles` keeps
    all images of a tile on one side, and those of a tile with a defect in the test; the counts are the same.
    """

    name = "mt_defect"
    categories = (_BY_NAME, _BY_TILE)
    license = (
        "Magnetic tile defects: no license is stated, the authors welcome its use; "
        "cite Huang, Qiu and Yuan, Surface defect saliency of magnetic tile, The Visual Computer, 2018."
    )

    def fetch(self, category: str, *, target: Path, request: FetchRequest) -> None:
        """Fill `target` with the folders MT_*, each with its Imgs."""
        logger.info("%s: %s", category, self.license)

        def take(folder: Path, is_ours: bool) -> None:
            found = find_folder(folder, _FREE)
            if found is None:
                raise AlmrrError(f"there is no folder {_FREE} in it")
            parts = [part for part in list_folders(found) if part.name.startswith(_PREFIX)]
            transfer(parts, target, move=is_ours)
            if category == _BY_TILE:
                write_parts(target, _find_tiles(target))
            check_counts(self.items(category, target), self.expected(category), name=category, strict=request.strict)

        obtain(_OFFER, target=target, request=request, take=take)

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the split by hash of the name, or of the tile; the empty masks of free images are left out."""
        # The images are .jpg; the .png of the same name beside it is the mask.
        free, defective = list_images(folder / _FREE / "Imgs", (".jpg",)), _list_defective(folder)
        tiles = _read_tiles(folder) if category == _BY_TILE else {}
        chosen = _choose_tiles(free, defective, tiles) if tiles else _choose_images(free)
        normal = [
            Item(path, None, "train" if path in chosen else "test", "normal", GOOD, tiles.get(path, ""))
            for path in free
        ]
        return normal + [
            Item(path, path.with_suffix(".png"), "test", "defective", kind, tiles.get(path, ""))
            for path, kind in defective.items()
        ]

    def expected(self, category: str) -> Counts:
        """Return the counts of the whole set under this split."""
        return Counts(_TRAIN, 952 - _TRAIN, 392)


def _list_defective(folder: Path) -> dict[Path, str]:
    """Images of tiles with a defect, and its kind."""
    return {
        path: kind.name.removeprefix(_PREFIX).lower()
        for kind in list_folders(folder)
        if kind.name != _FREE and kind.name.startswith(_PREFIX)
        for path in list_images(kind / "Imgs", (".jpg",))
    }


def _choose_images(free: Iterable[Path]) -> set[Path]:
    return set(sorted(free, key=lambda path: _hash(path.name))[:_TRAIN])


def _choose_tiles(free: Iterable[Path], defective: Iterable[Path], tiles: Mapping[Path, str]) -> set[Path]:
    """Take whole tiles in the order of their hash, as long as the training images do not become too many."""
    tested = {tiles[path] for path in defective}
    members: dict[str, list[Path]] = {}
    for path in free:
        if tiles[path] not in tested:
            members.setdefault(tiles[path], []).append(path)
    chosen: set[Path] = set()
    for tile in sorted(members, key=_hash):
        if len(chosen) + len(members[tile]) <= _TRAIN:
            chosen.update(members[tile])
    return chosen


def _find_tiles(folder: Path) -> dict[Path, str]:
    """Name each image's tile after the first one that shows it."""
    images = [*list_images(folder / _FREE / "Imgs", (".jpg",)), *_list_defective(folder)]
    return {image: images[first].stem for image, first in zip(images, group_by_tile(images), strict=True)}


def _read_tiles(folder: Path) -> dict[Path, str]:
    tiles = read_parts(folder)
    if not tiles:
        raise AlmrrError(
            f"{folder} holds no {PARTS_FILE}, the list of images of the same tile; fetch {_BY_TILE} again."
        )
    return tiles


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
