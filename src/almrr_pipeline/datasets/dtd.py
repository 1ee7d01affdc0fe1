"""The Describable Textures Dataset as texture (Cimpoi et al., CVPR 2014)."""

from __future__ import annotations

import logging
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder, list_folders, transfer
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.manifest import check_images
from almrr_pipeline.datasets.obtain import Archive, DownloadSpec, obtain
from almrr_pipeline.datasets.base import FetchRequest

logger = logging.getLogger(__name__)

NAME = "dtd"
LICENSE = (
    "DTD, the Describable Textures Dataset, is made available for research; cite Cimpoi et al., Describing Textures in "
    "the Wild, CVPR 2014."
)
_PUBLISHED = 47 * 120
_OFFER = DownloadSpec(
    NAME,
    NAME,
    (
        Archive(
            NAME,
            "dtd-r1.0.1.tar.gz",
            ("https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",),
            "e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205",
        ),
    ),
)


def fetch_dtd(*, target: Path, request: FetchRequest) -> None:
    """Fill the empty folder `target` with CLASS/*.jpg; any folder of folders of images may stand in for DTD.

    Raises:
        AlmrrError: DTD could not be fetched, an image is broken, or the count is not the published one and `strict`.
    """
    logger.info("%s", LICENSE)

    def take(folder: Path, is_ours: bool) -> None:
        found = find_folder(folder, "images")
        classes = list_folders(found / "images") if found else []
        images = [path for each in classes for path in list_images(each)]
        if not images:
            raise AlmrrError("there are no images under images/CLASS in it")
        check_images(images, root=folder)
        if len(images) != _PUBLISHED:
            message = f"{NAME}: {len(images)} images, published are {_PUBLISHED}"
            if request.strict:
                raise AlmrrError(f"{message}; fetch it again, or set data.strict to false.")
            logger.warning("%s", message)
        transfer(classes, target, move=is_ours)

    obtain(_OFFER, target=target, request=request, take=take)
