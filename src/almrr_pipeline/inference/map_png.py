"""Anomaly maps as 16-bit gray PNG files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from almrr_pipeline.common.arrays import AnomalyMap


def encode_map(anomaly_map: AnomalyMap) -> bytes:
    """Encode an anomaly map, float32 (H, W) in [0, 1], as 16-bit gray PNG, 65535 for 1."""
    gray = np.rint(anomaly_map * np.float32(65535)).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(gray).save(stream, format="PNG")
    return stream.getvalue()
