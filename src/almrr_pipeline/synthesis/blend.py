"""Blending of an anomaly into a normal image (stage 1 of ALMRR, arXiv 2407.17705).

    I_a = (1 - M) I + (1 - b) M A + b M I

Images are blended by their values in [0, 1], stored as uint8; the ImageNet normalization belongs to
the backbone and comes later.
"""

from __future__ import annotations

import numpy as np

from almrr_pipeline.common.arrays import ImageArray, MaskArray


def blend_anomaly(
    normal: ImageArray, anomaly: ImageArray, mask: MaskArray, *, opacity: float
) -> ImageArray:
    """Return I_a, uint8 in [0, 255], shape (H, W, 3), rounded to the nearest of 255 steps.

    Args:
        normal: I, uint8 in [0, 255], shape (H, W, 3); it is not changed.
        anomaly: A, uint8 in [0, 255], shape (H, W, 3).
        mask: M, bool, shape (H, W).
        opacity: b in [0, 1], the fraction of the normal image that shines through.
    """
    b = np.float32(opacity)
    mixed = (1 - b) * anomaly[mask] + b * normal[mask]  # (pixels, 3), float32 in [0, 255]
    augmented = normal.copy()  # outside of the mask the formula leaves I as it is
    augmented[mask] = np.rint(mixed)
    return augmented
