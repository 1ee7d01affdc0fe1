"""Image threshold and pixel threshold from normal validation images.

Both are conformal quantiles (`almrr_pipeline.evaluation.thresholds`). Of normal images from the
process that the validation images come from, at most the chosen fraction is

- called anomalous: the image threshold is taken from the images' scores;
- shown with an outline anywhere: the pixel threshold is taken from the largest value of each map.

No defective image and no test image takes part. Resizing a map to the image's own size does not
overshoot, so the pixel threshold, taken at the network's scale, holds at both sizes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from almrr_pipeline.common.images import Reading, read_image
from almrr_pipeline.common.progress import track
from almrr_pipeline.evaluation.thresholds import conformal_threshold
from almrr_pipeline.inference.inference_config import Thresholds
from almrr_pipeline.inference.looks import find_usual
from almrr_pipeline.inference.map_predictor import MapPredictor
from almrr_pipeline.inference.predictor import image_score

logger = logging.getLogger(__name__)


def calibrate(
    predictor: MapPredictor,
    image_paths: Sequence[Path],
    *,
    smoothing: int,
    false_alarm_rate: float,
) -> Thresholds:
    """Choose both thresholds; without images both are undefined and hold the reason.

    Args:
        predictor: the fused model.
        image_paths: validation images: normal, not trained on, not from the test set. Copies of an
            image are no further evidence: they are counted once, with a warning.
        smoothing: side of the mean filter of `image_score`, in pixels.
        false_alarm_rate: the chosen fraction, in (0, 1).

    Raises:
        AlmrrError: an image cannot be read, or the rate is out of range.
    """
    image_paths = _leave_out_copies(image_paths, predictor.reading)
    scores, peaks, looks = [], [], []
    with track(len(image_paths), unit="images", description="calibrate") as advance:
        for scaled in predictor.maps(image_paths):
            scores.append(image_score(scaled.anomaly_map, smoothing))
            peaks.append(float(scaled.anomaly_map.max()))
            looks.append(scaled.look)
            advance(1)
    event = "shows an outline though it is normal"
    image = conformal_threshold(scores, false_alarm_rate)
    pixel = conformal_threshold(peaks, false_alarm_rate, event=event)
    logger.info("Thresholds: image %s, pixel %s.", image.value, pixel.value)
    return Thresholds(image=image, pixel=pixel, usual=find_usual(looks))


def _leave_out_copies(image_paths: Sequence[Path], reading: Reading | None) -> list[Path]:
    """Keep the first of the images with equal pixels, whatever their files' formats."""
    with ThreadPoolExecutor(max_workers=4) as threads:  # decoding releases the GIL
        pixels = list(threads.map(partial(_hash_pixels, reading=reading), image_paths))
    first: dict[bytes, Path] = {}
    for content, path in zip(pixels, image_paths, strict=True):
        first.setdefault(content, path)
    if copies := len(image_paths) - len(first):
        logger.warning(
            "%d of %d normal images are copies of others; each image is counted once, %d in all.",
            copies,
            len(image_paths),
            len(first),
        )
    return list(first.values())


def _hash_pixels(path: Path, *, reading: Reading | None) -> bytes:
    image = read_image(path, reading)
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
