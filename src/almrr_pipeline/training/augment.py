"""Augmentation: flips and rot90, the eight symmetries of a square, each image in its own way."""

from __future__ import annotations

import torch
from torch import Tensor

FLIPS = 0b011
"""Bits of a symmetry that flip: bit 0 left and right, bit 1 up and down."""
TRANSPOSE = 0b100
"""Bit of a symmetry that then swaps rows and columns, which with the flips gives all of rot90."""


def apply_symmetries(images: Tensor, symmetries: Tensor) -> Tensor:
    """Flip and rotate each image of a batch in its own way.

    Args:
        images: any type, shape (B, H, W) or (B, H, W, 3).
        symmetries: integers in [0, 8), shape (B,), bits as above; `TRANSPOSE` has no effect on
            images that are not square.

    Returns:
        Images of the same shape and type.
    """

    def where(bit: int, changed: Tensor, kept: Tensor) -> Tensor:
        chosen = (symmetries & bit != 0).view(-1, *[1] * (kept.ndim - 1))
        return torch.where(chosen, changed, kept)

    images = where(0b001, images.flip(2), images)
    images = where(0b010, images.flip(1), images)
    if images.shape[1] == images.shape[2]:
        images = where(TRANSPOSE, images.transpose(1, 2), images)
    return images
