"""Textures that anomalies are made of: those of scikit-image's wheel, and DTD.

scikit-image carries photographs of other things than the sample suite's. Squares are cut out of
each, so that resizing to the network's input does not distort them: the largest ones, and smaller
ones for a variety of scales. Nearly uniform squares (a night sky) are left out, because they would
only give gray spots.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder, list_folders
from almrr_pipeline.common.images import list_images, read_image, resize_image
from almrr_pipeline.common.progress import track
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.folder import list_normal
from almrr_pipeline.datasets.manifest import Item, inspect_items
from almrr_pipeline.datasets.obtain import Archive, ArchivedDataset

logger = logging.getLogger(__name__)

IMAGES = (
    "astronaut.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
"""Files in scikit-image's wheel, without brick, grass and gravel of the sample suite."""
LARGEST = 512  # largest side of a square in pixels; no network input here needs more
DETAIL = 0.55  # side of a smaller square, as a fraction of the largest one that fits
LEAST_STD = 12.0  # std of the gray values, of 255, below which a square counts as uniform
_PUBLISHED = 47 * 120  # classes and their images
_ADDRESS = "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"
_SHA256 = "e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205"


def read_package_image(name: str) -> ImageArray:
    """Read an image from the installed scikit-image, without its downloader; may raise."""
    with resources.as_file(resources.files("skimage.data") / name) as path:
        if path.is_file():
            return read_image(path)
    advice = "install the version in constraints.txt, or choose another suite or data.textures: dtd"
    raise AlmrrError(f"The installed scikit-image does not carry {name}; {advice}.")


def write_package_textures(target: Path) -> None:
    """Fill the existing folder `target` with the textures as PNG files, always the same."""
    with track(len(IMAGES), unit="images", description="cut textures") as advance:
        for name in IMAGES:
            for number, square in enumerate(cut_squares(read_package_image(name))):
                side = min(LARGEST, len(square))
                image = Image.fromarray(resize_image(square, (side, side)))
                image.save(target / f"{Path(name).stem}_{number:02d}.png", compress_level=1)
            advance(1)


def cut_squares(image: ImageArray) -> Iterator[ImageArray]:
    """Cut the largest squares, then a grid of smaller ones, without uniform ones."""
    height, width = image.shape[:2]
    for side in (min(height, width), round(DETAIL * min(height, width))):
        for top in _spread_starts(height, side):
            for left in _spread_starts(width, side):
                square = image[top : top + side, left : left + side]
                if square.mean(axis=2).std() >= LEAST_STD:
                    yield square


def _spread_starts(length: int, side: int) -> list[int]:
    """Return the starts of the fewest evenly spread intervals of `side` that cover `length`."""
    count = -(-length // side)
    return np.linspace(0, length - side, count).round().astype(int).tolist() if count > 1 else [0]


class Dtd(ArchivedDataset):
    """DTD (Cimpoi et al., CVPR 2014): CLASS/*.jpg; any images/CLASS may replace it."""

    name = "dtd"
    archive = Archive(name, "dtd-r1.0.1.tar.gz", (_ADDRESS,), _SHA256)
    license = (
        "DTD, the Describable Textures Dataset, is made available for research; "
        "cite Cimpoi et al., Describing Textures in the Wild, CVPR 2014."
    )

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
        items = self.items(category, target)
        count = len(inspect_items(items, root=target, settings=request.settings))
        if count != _PUBLISHED:
            message = f"{self.name}: {count} images, published are {_PUBLISHED}"
            if request.settings.strict:
                raise AlmrrError(f"{message}; fetch it again, or set data.strict to false.")
            logger.warning("%s", message)
