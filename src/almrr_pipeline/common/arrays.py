"""Array types shared by all packages."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ImageArray = npt.NDArray[np.uint8]  # RGB image, uint8 in [0, 255], shape (H, W, 3)
MaskArray = npt.NDArray[np.bool_]  # ground truth, True where anomalous, shape (H, W)
AnomalyMap = npt.NDArray[np.float32]
"""Anomaly scores of an image's pixels, float32 in [0, 1], shape (H, W)."""
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
