"""Textures from scikit-image's wheel: photographs of other things than the sample suite's.

Squares are cut out of each, so that resizing to the network's input does not distort them: the
largest ones, and smaller ones for a variety of scales. Nearly uniform squares (a night sky) are
left out, because they would only give gray spots.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import read_image, resize_image
from almrr_pipeline.common.progress import track

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
LARGEST = 512
"""Largest side of a square in pixels; no network input here needs more."""
DETAIL = 0.55
"""Side of a smaller square, as a fraction of the largest one that fits."""
LEAST_STD = 12.0
"""Std of the gray values, of 255, below which a square counts as uniform."""


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
