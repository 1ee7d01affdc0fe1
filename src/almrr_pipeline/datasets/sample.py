"""The sample suite: three real textures that come with scikit-image, with drawn defects; nothing is downloaded.

Brick, grass and gravel are photographs of 512x512 pixels in gray. Training images are cut from the upper left of
each, validation images from the lower left, test images from the right; the strips in between no image touches.
So thresholds come from a part of the photograph that training has not seen, as test images do. Each crop gets its own
light and sensor noise, as images taken one after the other have. Defects are drawn on test crops only, and the ground
truth is where the finished image differs visibly from what it would have been without the defect.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.arrays import MaskArray
from almrr_pipeline.common.progress import track
from almrr_pipeline.datasets.drawn_defects import DRAWINGS, Field
from almrr_pipeline.datasets.layout import list_normal, list_test
from almrr_pipeline.datasets.manifest import Counts, Item
from almrr_pipeline.datasets.package_textures import read_package_image
from almrr_pipeline.datasets.base import FetchRequest, Source

logger = logging.getLogger(__name__)

PREFIX = "sample_"
TEXTURES = ("brick", "grass", "gravel")
CROP = 160
"""Side of an image, in pixels."""
Part = tuple[slice, slice]
"""Rows and columns of the photograph."""
TRAIN_PART: Part = (slice(0, 336), slice(0, 296))
VALIDATION_PART: Part = (slice(352, 512), slice(0, 296))
TEST_PART: Part = (slice(0, 512), slice(312, 512))
"""38 %, 18 % and 39 % of the photograph; 16 rows or columns in between stay unused."""
TRAIN_IMAGES = 200
VALIDATION_IMAGES = 40
"""More than the 19 without which there is no threshold at a false-alarm rate of 5 %."""
TEST_NORMAL_IMAGES = 20
IMAGES_PER_DEFECT = 6
VISIBLE = 7.0
"""Smallest difference that counts as visible, of 255, averaged over a pixel's surroundings."""
LEAST_DEFECT = 40
"""Pixels; a drawing that has changed fewer of them visibly is drawn again elsewhere."""
FAINTEST = 0.35
"""Strength of the faintest defect of each kind; they rise to 1."""
_MOST_DRAWS = 50
_SEED = 0
_SPECK = 8

Gray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Camera:
    """Light and sensor of one exposure."""

    light: Field
    """Factor of each pixel's brightness, shape (S, S)."""
    noise: Field
    """Added by the sensor, of 255, shape (S, S)."""

    def take(self, surface: Field) -> Gray:
        """Take an image of a surface, float in [0, 1], shape (S, S): uint8 in [0, 255], gray."""
        return np.clip(np.rint(255.0 * surface * self.light + self.noise), 0, 255).astype(np.uint8)


class Sample(Source):
    """Brick, grass and gravel from scikit-image's wheel."""

    name = "sample"
    categories = tuple(PREFIX + texture for texture in TEXTURES)
    license = (
        "The textures brick, grass and gravel come with scikit-image and are in the public domain (CC0); "
        "cite van der Walt et al., scikit-image: image processing in Python, PeerJ 2014."
    )

    def fetch(self, category: str, *, target: Path, request: FetchRequest) -> None:
        """Cut and draw the images of a category; the same ones each time."""
        logger.info("%s: %s", category, self.license)
        texture = category.removeprefix(PREFIX)
        photograph = read_package_image(f"{texture}.png")[..., 0] / 255.0
        write_category(photograph, target, seed=(_SEED, TEXTURES.index(texture)))

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the split that the images were drawn for."""
        return (
            list_normal(folder / "train" / "good", "train")
            + list_normal(folder / "validation" / "good", "validation")
            + list_test(folder / "test", folder / "ground_truth")
        )

    def expected(self, category: str) -> Counts:
        """Return the numbers of images that `fetch` draws."""
        return Counts(TRAIN_IMAGES, TEST_NORMAL_IMAGES, IMAGES_PER_DEFECT * len(DRAWINGS), VALIDATION_IMAGES)


def write_category(photograph: Field, target: Path, *, seed: tuple[int, int]) -> None:
    """Write a category in MVTec AD's layout; image k of each kind depends on the photograph, the seed and k alone.

    Args:
        photograph: float in [0, 1], shape (512, 512).
        target: existing, empty folder.
        seed: of the suite, and which category.
    """
    normal = [  # led by the number that seeds the draws; the defects have those in between
        (0, "train", TRAIN_PART, TRAIN_IMAGES),
        (1, "test", TEST_PART, TEST_NORMAL_IMAGES),
        (2 + len(DRAWINGS), "validation", VALIDATION_PART, VALIDATION_IMAGES),
    ]
    strengths = np.linspace(FAINTEST, 1.0, IMAGES_PER_DEFECT).tolist()
    total = sum(count for *_, count in normal) + len(DRAWINGS) * len(strengths)
    with track(total, unit="images", description="draw the sample suite") as advance:
        for kind, split, part, count in normal:
            for number in range(count):
                generator = np.random.default_rng([*seed, kind, number])
                surface = cut_surface(photograph, part, generator)
                _write(draw_camera(generator).take(surface), target / split / "good" / f"{number:03d}.png")
                advance(1)
        for kind, defect in enumerate(DRAWINGS, start=2):
            for number, strength in enumerate(strengths):
                generator = np.random.default_rng([*seed, kind, number])
                image, mask = draw_defective(photograph, defect, generator, strength=strength)
                _write(image, target / "test" / defect / f"{number:03d}.png")
                _write(255 * mask.astype(np.uint8), target / "ground_truth" / defect / f"{number:03d}_mask.png")
                advance(1)


def cut_surface(photograph: Field, part: Part, generator: np.random.Generator) -> Field:
    """Cut a random square, `CROP` wide, out of a part of a photograph."""
    surface = photograph[part]
    top, left = (generator.integers(length - CROP + 1) for length in surface.shape)
    return surface[top : top + CROP, left : left + CROP]


def draw_camera(generator: np.random.Generator) -> Camera:
    """Draw an exposure: brightness within 6 %, a fall-off across the image within 4 %, noise of about 1 of 255."""
    across = np.linspace(-1.0, 1.0, CROP)
    falloff = generator.uniform(-0.04, 0.04, 2)
    light = generator.uniform(0.94, 1.06) * (1.0 + falloff[0] * across[:, None] + falloff[1] * across)
    return Camera(light, generator.normal(0.0, generator.uniform(0.5, 1.5), (CROP, CROP)))


def draw_defective(
    photograph: Field, defect: str, generator: np.random.Generator, *, strength: float
) -> tuple[Gray, MaskArray]:
    """Draw a defect on a crop of the test part.

    Args:
        photograph: float in [0, 1], shape (512, 512).
        defect: a key of `DRAWINGS`.
        generator: draws crop, light and defect.
        strength: contrast of the defect, from faint (0.35) to plain (1).

    Returns:
        The image, uint8 (S, S), and its ground truth, bool (S, S).

    Raises:
        AlmrrError: 50 drawings left no visible defect, as on a photograph that is black.
    """
    for _ in range(_MOST_DRAWS):
        surface = cut_surface(photograph, TEST_PART, generator)
        camera = draw_camera(generator)
        defective = camera.take(np.clip(DRAWINGS[defect](surface, generator, strength), 0.0, 1.0))
        mask = outline_difference(camera.take(surface), defective)
        if mask.sum() >= LEAST_DEFECT:
            return defective, mask
    raise AlmrrError(f"No {defect} could be drawn visibly on this photograph; it needs a texture of middle brightness.")


def outline_difference(without: Gray, with_defect: Gray) -> MaskArray:
    """Return where two images differ visibly, as a person would outline it: gaps closed, single specks left out.

    Args:
        without: the image without the defect, uint8 (H, W).
        with_defect: the same with it.

    Returns:
        bool (H, W).
    """
    difference = np.abs(with_defect.astype(np.float64) - without)
    visible = ndimage.gaussian_filter(difference, 0.7) >= VISIBLE
    closed = ndimage.binary_closing(np.pad(visible, 4), iterations=2)[4:-4, 4:-4]
    filled = ndimage.binary_fill_holes(closed)
    labels, count = ndimage.label(filled)
    areas = ndimage.sum_labels(filled, labels, np.arange(count + 1))
    outlined: MaskArray = filled & (areas[labels] >= _SPECK)
    return outlined


def _write(image: Gray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)  # noise does not compress, and level 6 takes most of the time
