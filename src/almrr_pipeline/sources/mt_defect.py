"""Magnetic tile defects (Huang, Qiu, Yuan: Surface defect saliency of magnetic tile, The Visual Computer 2018)."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from almrr_pipeline.errors import AlmrrError
from almrr_pipeline.sources.files import find_folder, list_folders, list_pictures, transfer
from almrr_pipeline.sources.layout import GOOD
from almrr_pipeline.sources.manifest import Counts, Item, check_counts
from almrr_pipeline.sources.obtain import Archive, Offer, obtain
from almrr_pipeline.sources.source import FetchRequest, Source

logger = logging.getLogger(__name__)

_PREFIX = "MT_"
_FREE = "MT_Free"
_TRAIN = 761
"""Training pictures in the literature's most cited split, about 80 % of the 952 free ones."""
_OFFER = Offer(
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
    """952 pictures of free tiles and 392 of five kinds of defect, grey and of many sizes.

    Nobody published a split, only its counts. Ours trains on the 761 free pictures whose file names have the lowest
    sha256 and tests on the other 191 and on all defective ones: the counts of the literature, chosen by no one.
    """

    name = "mt_defect"
    categories = ("mt_defect",)
    license = (
        "Magnetic tile defects: no licence is stated, the authors welcome its use; "
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
            check_counts(self.items(category, target), self.expected(category), name=category, strict=request.strict)

        obtain(_OFFER, target=target, request=request, take=take)

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the split by hash of the name; the empty masks of free pictures are left out."""
        # The pictures are .jpg; the .png of the same name beside it is the mask.
        free = list_pictures(folder / _FREE / "Imgs", (".jpg",))
        train = set(sorted(free, key=lambda path: hashlib.sha256(path.name.encode()).digest())[:_TRAIN])
        items = [Item(path, None, "train" if path in train else "test", "normal", GOOD) for path in free]
        for kind in list_folders(folder):
            if kind.name != _FREE and kind.name.startswith(_PREFIX):
                defect = kind.name.removeprefix(_PREFIX).lower()
                items += [
                    Item(path, path.with_suffix(".png"), "test", "defective", defect)
                    for path in list_pictures(kind / "Imgs", (".jpg",))
                ]
        return items

    def expected(self, category: str) -> Counts:
        """Return the counts of the whole set under this split."""
        return Counts(_TRAIN, 952 - _TRAIN, 392)
