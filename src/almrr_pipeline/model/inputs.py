"""Checks of image sizes and images, and which part of blanked images counts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.region import BLANK

SIDE_MULTIPLE = 16
"""The deepest feature map has stride 16, and features (4) times patches (4) make 16 too."""
SMALLEST_SIDE = 128
"""The U-Net halves a grid of a quarter of the side five times."""
_SAME = 1 / 512
"""Half of a gray value: images are bytes divided by 255."""


def check_image_size(image_size: tuple[int, int]) -> None:
    """Refuse a size that the strides do not divide.

    Raises:
        AlmrrError: a side does not fit; names the nearest ones that do.
    """
    for side in image_size:
        if side % SIDE_MULTIPLE or side < SMALLEST_SIDE:
            below = max(side // SIDE_MULTIPLE * SIDE_MULTIPLE, SMALLEST_SIDE)
            above = below + SIDE_MULTIPLE
            raise AlmrrError(
                f"image_size {tuple(image_size)}: each side must be a multiple of {SIDE_MULTIPLE} "
                f"and at least {SMALLEST_SIDE}; instead of {side} take {below} or {above}."
            )


def check_shape(images: Tensor, image_size: tuple[int, int]) -> None:
    """Refuse images whose shape or type the model was not built for.

    Raises:
        AlmrrError: names what was expected.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise AlmrrError(f"Images must be RGB of shape (B, 3, H, W); got {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise AlmrrError(
            f"Images must be floats in [0, 1], not {images.dtype}. Divide 8-bit values by 255."
        )
    rows, columns = images.shape[2:]
    if (rows, columns) != tuple(image_size):
        check_image_size((rows, columns))
        expected = tuple(image_size)
        raise AlmrrError(
            f"This model was built for images of {expected}; got {(rows, columns)}. Resize them."
        )


def check_images(images: Tensor, image_size: tuple[int, int]) -> None:
    """Refuse images whose map would have no meaning; values are not checked while tracing a graph.

    Raises:
        AlmrrError: names what was expected.
    """
    check_shape(images, image_size)
    if torch.compiler.is_compiling() or len(images) == 0:
        return
    low, high = (float(value) for value in torch.aminmax(images))  # NaN if any value is NaN
    if not (low > float("-inf") and high < float("inf")):
        raise AlmrrError(
            "Images hold values that are not finite (NaN or infinity); look at how they were read."
        )
    if low < 0.0 or high > 1.0:
        raise AlmrrError(
            f"Images must be in [0, 1]; these reach from {low:.4g} to {high:.4g}. Divide 8-bit "
            "values by 255; the model normalizes them itself."
        )


def find_counted(images: Tensor) -> Tensor:
    """Which pixels of blanked images (B, 3, H, W) count: all that are not blank; bool (B, H, W)."""
    blank = torch.tensor(BLANK, device=images.device).div(255)
    return ((images - blank[:, None, None]).abs() > _SAME).any(dim=1)


def find_counted_cells(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which cells of a grid over blanked images (B, 3, H, W) count: bool (B, *grid).

    Those of which half of the pixels count; where there are none, those with most.
    """
    counted = find_counted(images).float()[:, None]
    fraction = functional.adaptive_avg_pool2d(counted, grid)[:, 0]
    least = fraction.flatten(1).amax(dim=1).clamp(max=0.5)
    return (fraction >= least[:, None, None]) & (fraction > 0)
