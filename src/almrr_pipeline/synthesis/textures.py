"""Ten photometric and geometric operations, of which a few alter each anomaly texture.

The operations and their ranges are those of DRAEM (arXiv 2108.07610, section 3.1), where they come
from imgaug; here Pillow does the work. All randomness is drawn from the generator passed in.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from almrr_pipeline.common.arrays import ImageArray

EXPOSURE = (0.2, 0.8)  # least and largest |log| of the factor between two exposures: 1.22 and 2.23

Operation = Callable[[Image.Image, np.random.Generator], Image.Image]


def adjust_gamma(texture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Raise each channel to a power of its own in [0.5, 2]."""
    values = np.arange(256) / 255.0
    curves = values ** generator.uniform(0.5, 2.0, (3, 1))
    return texture.point(_as_table(255.0 * curves))


def adjust_brightness(texture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Multiply by a factor in [0.8, 1.2] and add a value in [-30, 30] of 255."""
    gain = generator.uniform(0.8, 1.2)
    curve = np.arange(256) * gain + generator.uniform(-30.0, 30.0)
    return texture.point(_as_table(np.tile(curve, 3)))


def adjust_sharpness(texture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Blur or sharpen: factor in [0, 2]; 0 is smoothed, 1 unchanged, 2 sharpened."""
    return ImageEnhance.Sharpness(texture).enhance(generator.uniform(0.0, 2.0))


def shift_hue_and_saturation(texture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Rotate the hue and shift the saturation, each by its own value in [-50, 50] of 255."""
    hue, saturation = generator.integers(-50, 50, 2, endpoint=True)
    values = np.arange(256)
    curves = ((values + hue) % 256, values + saturation, values)
    return texture.convert("HSV").point(_as_table(np.concatenate(curves))).convert("RGB")


def solarize(texture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Invert the values from a threshold in [32, 128] upwards."""
    return ImageOps.solarize(texture, threshold=int(generator.integers(32, 128, endpoint=True)))


def posterize(texture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Keep the highest 1 to 8 bits of each channel."""
    return ImageOps.posterize(texture, int(generator.integers(1, 8, endpoint=True)))


def invert(texture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Replace each value v by 255 - v."""
    return ImageOps.invert(texture)


def stretch_contrast(texture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Spread the values over the whole range, cutting off 0 to 20 % at each end (autocontrast)."""
    return ImageOps.autocontrast(texture, cutoff=float(generator.uniform(0.0, 20.0)))


def equalize(texture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Make the histogram of each channel uniform."""
    return ImageOps.equalize(texture)


def rotate(texture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Rotate by an angle in [-45, 45] degrees about the center, with black outside."""
    return texture.rotate(generator.uniform(-45.0, 45.0), resample=Image.Resampling.BILINEAR)


OPERATIONS: tuple[Operation, ...] = (  # in the order in which DRAEM lists them
    adjust_gamma, adjust_brightness, adjust_sharpness, shift_hue_and_saturation, solarize,
    posterize, invert, stretch_contrast, equalize, rotate,
)  # fmt: skip


def alter_texture(texture: ImageArray, *, count: int, generator: np.random.Generator) -> ImageArray:
    """Alter a texture by `count` different operations, drawn with their order; the paper takes 3.

    uint8 in [0, 255], shape (H, W, 3), in and out; the texture itself is not changed.
    """
    image = Image.fromarray(texture)
    for index in generator.permutation(len(OPERATIONS))[:count]:
        image = OPERATIONS[index](image, generator)
    return np.asarray(image)


def change_exposure(image: ImageArray, *, generator: np.random.Generator) -> ImageArray:
    """Change brightness and contrast, as if the surface were lit or ground otherwise.

    A value v becomes gain * (mean + contrast * (v - mean)), cut to [0, 255]. Gain and contrast are
    log-uniform; the gain differs from 1, either way, by at least the lower end of `EXPOSURE`.
    uint8 in [0, 255], shape (H, W, 3), in and out; the image itself is not changed.
    """
    gain = np.exp(generator.choice([-1.0, 1.0]) * generator.uniform(*EXPOSURE))
    contrast = np.exp(generator.uniform(-EXPOSURE[1], EXPOSURE[1]))
    mean = image.mean(dtype=np.float64)
    curve = gain * (mean + contrast * (np.arange(256) - mean))
    changed: ImageArray = np.clip(np.rint(curve), 0, 255).astype(np.uint8)[image]
    return changed


def remove_color(image: ImageArray) -> ImageArray:
    """Return an image's luma in all three channels, uint8 (H, W, 3)."""
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def has_color(image: ImageArray) -> bool:
    """Whether the three channels of an image, uint8 (H, W, 3), differ anywhere."""
    return bool((image[..., 1:] != image[..., :1]).any())


def _as_table(curve: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> list[int]:
    """Return a lookup table for Pillow: 3 x 256 values, rounded and cut to [0, 255]."""
    table: list[int] = np.clip(np.rint(curve), 0, 255).astype(int).ravel().tolist()
    return table
