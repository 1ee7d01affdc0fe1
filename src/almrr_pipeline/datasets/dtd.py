"""The Describable Textures Dataset as source of anomalies (Cimpoi et al., CVPR 2014)."""

from __future__ import annotations

import logging
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder, list_folders
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.manifest import check_images
from almrr_pipeline.datasets.obtain import Archive, DownloadSpec, obtain

logger = logging.getLogger(__name__)

NAME = "dtd"
LICENSE = (
    "DTD, the Describable Textures Dataset, is made available for research; "
    "cite Cimpoi et al., Describing Textures in the Wild, CVPR 2014."
)
_PUBLISHED = 47 * 120
_ADDRESS = "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"
_SHA256 = "e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205"
_SPEC = DownloadSpec(NAME, NAME, (Archive(NAME, "dtd-r1.0.1.tar.gz", (_ADDRESS,), _SHA256),))


def fetch_dtd(*, target: Path, request: FetchRequest) -> None:
    """Fill the empty folder `target` with CLASS/*.jpg; any images/CLASS may replace DTD.

    Raises:
        AlmrrError: DTD could not be fetched, or has a broken image or, where strict, another count.
    """
    logger.info("%s", LICENSE)

    def extract(folder: Path) -> list[Path]:
        found = find_folder(folder, "images")
        classes = list_folders(found / "images") if found else []
        if not any(list_images(each) for each in classes):
            raise AlmrrError("there are no images under images/CLASS in it")
        return classes

    def verify() -> None:
        images = [path for each in list_folders(target) for path in list_images(each)]
        check_images(images, root=target)
        if len(images) != _PUBLISHED:
            message = f"{NAME}: {len(images)} images, published are {_PUBLISHED}"
            if request.settings.strict:
                raise AlmrrError(f"{message}; fetch it again, or set data.strict to false.")
            logger.warning("%s", message)

    obtain(_SPEC, target=target, request=request, extract=extract, verify=verify)
