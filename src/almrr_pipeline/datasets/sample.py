"""Sample suite: three textures from scikit-image with drawn defects; nothing is downloaded.

Brick, grass and gravel are gray photographs of 512x512 pixels. Training images are crops of the
upper left of each, validation images of the lower left, test images of the right, so that neither
thresholds nor results come from pixels that the training has seen. Each crop gets its own light and
sensor noise. Defects are drawn on test crops only; the ground truth is where the image differs
visibly from the same image without the defect.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

from almrr_pipeline.common.arrays import Floats, MaskArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.progress import track
from almrr_pipeline.datasets.base import Dataset, FetchRequest
from almrr_pipeline.datasets.drawn_defects import DRAWINGS
from almrr_pipeline.datasets.folder import list_items
from almrr_pipeline.datasets.manifest import Counts, Item
from almrr_pipeline.datasets.textures import read_package_image

logger = logging.getLogger(__name__)

PREFIX = "sample_"
TEXTURES = ("brick", "grass", "gravel")
CROP = 160  # side of an image, in pixels
Region = tuple[slice, slice]  # rows and columns of the photograph
TRAIN_REGION: Region = (slice(0, 336), slice(0, 296))
VALIDATION_REGION: Region = (slice(352, 512), slice(0, 296))
TEST_REGION: Region = (slice(0, 512), slice(312, 512))
"""38 %, 18 % and 39 % of the photograph; 16 rows or columns in between stay unused."""
TRAIN_IMAGES = 200
VALIDATION_IMAGES = 40
"""More than the 19 without which there is no threshold at a false-alarm rate of 5 %."""
TEST_NORMAL_IMAGES = 20
IMAGES_PER_DEFECT_TYPE = 6
VISIBLE = 7.0  # smallest visible difference, of 255, averaged over a pixel's surroundings
LEAST_DEFECT = 40  # pixels; a drawing with fewer visible ones is drawn again elsewhere
FAINTEST = 0.35  # strength of the faintest defect of each type; they rise to 1
_MOST_DRAWS = 50
"""Drawings without a visible defect after which the photograph counts as unsuitable."""
_SEED = 0
_SPECK = 8  # pixels; smaller spots are not outlined
_DEFECTIVE_IMAGES = IMAGES_PER_DEFECT_TYPE * len(DRAWINGS)
_COUNTS = Counts(TRAIN_IMAGES, TEST_NORMAL_IMAGES, _DEFECTIVE_IMAGES, VALIDATION_IMAGES)

Gray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Camera:
    """Light and sensor noise of one exposure, each of shape (S, S)."""

    light: Floats  # factor of each pixel's brightness
    noise: Floats  # added by the sensor, of 255

    def take(self, surface: Floats) -> Gray:
        """Take an image of a surface, float in [0, 1], shape (S, S): uint8 in [0, 255], gray."""
        values = np.rint(255.0 * surface * self.light + self.noise)
        return np.clip(values, 0, 255).astype(np.uint8)


class Sample(Dataset):
    """Brick, grass and gravel from scikit-image's wheel."""

    name = "sample"
    counts = dict.fromkeys((PREFIX + texture for texture in TEXTURES), _COUNTS)
    license = (
        "The textures brick, grass and gravel come with scikit-image and are in the public domain "
        "(CC0); cite van der Walt et al., scikit-image: image processing in Python, PeerJ 2014."
    )

    def fetch(self, category: str, *, target: Path, request: FetchRequest) -> None:
        """Draw the images of a category; the same ones each time."""
        logger.info("%s: %s", category, self.license)
        texture = category.removeprefix(PREFIX)
        photograph = read_package_image(f"{texture}.png")[..., 0] / 255.0
        write_category(photograph, target, seed=(_SEED, TEXTURES.index(texture)))

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the split that the images were drawn for."""
        return list_items(folder)


def write_category(photograph: Floats, target: Path, *, seed: tuple[int, int]) -> None:
    """Write a category in MVTec AD's layout into the empty folder `target`.

    The photograph is float in [0, 1], shape (512, 512); the seed is that of the suite and the
    number of the category. Each image has a random generator of its own.
    """
    normal = [  # the first number seeds the images; the defect types have those in between
        (0, "train", TRAIN_REGION, TRAIN_IMAGES),
        (1, "test", TEST_REGION, TEST_NORMAL_IMAGES),
        (2 + len(DRAWINGS), "validation", VALIDATION_REGION, VALIDATION_IMAGES),
    ]
    strengths = np.linspace(FAINTEST, 1.0, IMAGES_PER_DEFECT_TYPE).tolist()
    total = sum(count for *_, count in normal) + len(DRAWINGS) * len(strengths)
    with track(total, unit="images", description="draw the sample suite") as advance:
        for stream, split, region, count in normal:
            for number in range(count):
                generator = np.random.default_rng([*seed, stream, number])
                surface = cut_surface(photograph, region, generator)
                image = draw_camera(generator).take(surface)
                _write(image, target / split / "good" / f"{number:03d}.png")
                advance(1)
        for stream, defect_type in enumerate(DRAWINGS, start=2):
            for number, strength in enumerate(strengths):
                generator = np.random.default_rng([*seed, stream, number])
                image, mask = draw_defective(photograph, defect_type, generator, strength=strength)
                _write(image, target / "test" / defect_type / f"{number:03d}.png")
                masks = target / "ground_truth" / defect_type
                _write(255 * mask.astype(np.uint8), masks / f"{number:03d}_mask.png")
                advance(1)


def cut_surface(photograph: Floats, region: Region, generator: Generator) -> Floats:
    """Cut a random square, `CROP` wide, out of a region of a photograph."""
    surface = photograph[region]
    top, left = (generator.integers(length - CROP + 1) for length in surface.shape)
    return surface[top : top + CROP, left : left + CROP]


def draw_camera(generator: Generator) -> Camera:
    """Draw brightness within 6 %, a fall-off within 4 %, and noise of about 1 of 255."""
    across = np.linspace(-1.0, 1.0, CROP)
    falloff = generator.uniform(-0.04, 0.04, 2)
    brightness = generator.uniform(0.94, 1.06)
    light = brightness * (1.0 + falloff[0] * across[:, None] + falloff[1] * across)
    return Camera(light, generator.normal(0.0, generator.uniform(0.5, 1.5), (CROP, CROP)))


def draw_defective(
    photograph: Floats, defect_type: str, generator: Generator, *, strength: float
) -> tuple[Gray, MaskArray]:
    """Draw a defect on a crop of the photograph's test region, from faint (0.35) to plain (1).

    Returns:
        The image, uint8 (S, S), and its ground truth, bool (S, S).

    Raises:
        AlmrrError: 50 drawings left no visible defect, as on a black photograph.
    """
    draw = DRAWINGS[defect_type]
    for _ in range(_MOST_DRAWS):
        surface = cut_surface(photograph, TEST_REGION, generator)
        camera = draw_camera(generator)
        defective = camera.take(np.clip(draw(surface, generator, strength), 0.0, 1.0))
        mask = outline_difference(camera.take(surface), defective)
        if mask.sum() >= LEAST_DEFECT:
            return defective, mask
    advice = "it needs a texture of middle brightness"
    raise AlmrrError(f"No {defect_type} could be drawn visibly on this photograph; {advice}.")


def outline_difference(without: Gray, with_defect: Gray) -> MaskArray:
    """Outline where two images, uint8 (H, W), differ visibly: bool (H, W), without specks."""
    difference = np.abs(with_defect.astype(np.float64) - without)
    visible = ndimage.gaussian_filter(difference, 0.7) >= VISIBLE
    closed = ndimage.binary_closing(np.pad(visible, 4), iterations=2)[4:-4, 4:-4]
    filled = ndimage.binary_fill_holes(closed)
    labels, count = ndimage.label(filled)
    areas = ndimage.sum_labels(filled, labels, np.arange(count + 1))
    return np.asarray(filled & (areas[labels] >= _SPECK))


def _write(image: Gray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Noise does not compress, and the default level 6 takes most of the time.
    Image.fromarray(image).save(path, compress_level=1)
