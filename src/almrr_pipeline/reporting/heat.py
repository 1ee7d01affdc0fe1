"""Anomaly maps as colours: one perceptually uniform scale, fixed to [0, 1] in every picture."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from almrr_pipeline.images import ImageArray

# Every fifth colour of the map "inferno" by Stefan van der Walt and Nathaniel Smith (matplotlib, CC0): its lightness
# rises evenly from black to pale yellow, so that equal steps of the anomaly map look equal, in grey print too.
_INFERNO = """
000004 02020c 050417 0a0722 10092d 160b39 1e0c45 260c51 2f0a5b 380962 400a67 490b6a 510e6c
59106e 61136e 69166e 71196e 781c6d 801f6c 88226a 902568 982766 a02a63 a82e5f b0315b b73557
bf3952 c63d4d cc4248 d34743 d94d3d df5337 e45a31 e9612b ed6925 f1711f f47918 f78212 f98b0b
fa9407 fb9d07 fca60c fcb014 fbba1f fac42a f8cd37 f6d746 f4e156 f2ea69 f2f27d f5f992 fcffa4
"""
_ANCHORS = np.array([list(bytes.fromhex(colour)) for colour in _INFERNO.split()], dtype=np.float64)
_LEVELS = 256


def _interpolate_anchors() -> ImageArray:
    levels = np.linspace(0, len(_ANCHORS) - 1, _LEVELS)
    channels = [np.interp(levels, np.arange(len(_ANCHORS)), _ANCHORS[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


HEAT_TABLE: ImageArray = _interpolate_anchors()
"""Colours of the values 0, 1/255, ..., 1: uint8 RGB, shape (256, 3)."""


def colour_map(anomaly_map: npt.NDArray[np.floating]) -> ImageArray:
    """Colour an anomaly map on the fixed scale 0 (black) to 1 (pale yellow).

    Args:
        anomaly_map: values in [0, 1], shape (H, W); values outside take the colour of the nearer end, NaN that of 0.

    Returns:
        uint8 RGB, shape (H, W, 3).
    """
    values = np.clip(np.nan_to_num(anomaly_map, nan=0.0), 0.0, 1.0)
    return np.asarray(HEAT_TABLE[np.rint(values * (_LEVELS - 1)).astype(np.uint8)])
