"""The Describable Textures Dataset as source of anomalies (Cimpoi et al., CVPR 2014)."""

from __future__ import annotations

import logging
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder, list_folders
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.folder import list_normal
from almrr_pipeline.datasets.manifest import Item, inspect_items
from almrr_pipeline.datasets.obtain import Archive, ArchivedDataset

logger = logging.getLogger(__name__)

_PUBLISHED = 47 * 120
_ADDRESS = "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"
_SHA256 = "e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205"


class Dtd(ArchivedDataset):
    """CLASS/*.jpg: 47 classes of 120 textures; any images/CLASS may replace them."""

    name = "dtd"
    license = (
        "DTD, the Describable Textures Dataset, is made available for research; "
        "cite Cimpoi et al., Describing Textures in the Wild, CVPR 2014."
    )

    def archives(self, category: str) -> tuple[Archive]:
        """Return the one archive."""
        return (Archive(self.name, "dtd-r1.0.1.tar.gz", (_ADDRESS,), _SHA256),)

    def extract(self, category: str, folder: Path) -> list[Path]:
        """Return the folders of the classes."""
        found = find_folder(folder, "images")
        classes = list_folders(found / "images") if found else []
        if not any(list_images(each) for each in classes):
            raise AlmrrError("there are no images under images/CLASS in it")
        return classes

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return all textures, as normal images of one split."""
        return [item for each in list_folders(folder) for item in list_normal(each, "train")]

    def verify(self, category: str, target: Path, request: FetchRequest) -> None:
        """Open every texture and compare their count with the published one."""
        count = len(inspect_items(self.items(category, target), root=target))
        if count != _PUBLISHED:
            message = f"{self.name}: {count} images, published are {_PUBLISHED}"
            if request.settings.strict:
                raise AlmrrError(f"{message}; fetch it again, or set data.strict to false.")
            logger.warning("%s", message)
