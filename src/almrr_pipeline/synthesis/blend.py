"""Putting an anomaly into a normal image: I_a = (1 - M) I + (1 - b) M A + b M I (stage 1 of ALMRR, arXiv 2407.17705).

Images are blended by their values in [0, 1] (stored as uint8), never after the ImageNet normalization, which belongs
to the backbone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from almrr_pipeline.common.images import ImageArray


def blend_anomaly(
    normal: ImageArray, anomaly: ImageArray, mask: npt.NDArray[np.bool_], *, opacity: float
) -> ImageArray:
    """Blend a texture into a normal image where the mask is set.

    Outside of the mask the formula leaves I as it is, so only the mask's pixels are computed.

    Args:
        normal: I, uint8 in [0, 255], shape (H, W, 3); it is not changed.
        anomaly: A, of the same kind and shape.
        mask: M, bool, shape (H, W).
        opacity: b in [0, 1], the share of the normal image that shines through.

    Returns:
        I_a, uint8 in [0, 255], shape (H, W, 3): the formula's value, rounded to the nearest of 255 steps.
    """
    share = np.float32(opacity)
    mixed = (1 - share) * anomaly[mask] + share * normal[mask]  # float32 (pixels, 3); 255 times the formula's value
    augmented = normal.copy()
    augmented[mask] = np.rint(mixed)
    return augmented
