"""Thresholds from normal images that took no part in training: no defect, and no test image, is ever looked at.

Both thresholds keep the same promise by the same means, conformal quantiles (`almrr_pipeline.evaluation.thresholds`):
of normal images of the kind that the calibration images are drawn from, at most the chosen share is

- called anomalous: the image threshold is taken over the images' scores;
- shown with an outline anywhere: the pixel threshold is taken over the largest value of each image's map.

A map's largest value at the image's own size never exceeds that at the network's scale, as interpolation does not
overshoot; so the pixel threshold's promise covers both. A value is anomalous if it lies above the threshold, not at
it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from almrr_pipeline.config import Tiling
from almrr_pipeline.evaluation.thresholds import conformal_threshold
from almrr_pipeline.inference.predictor import image_score, predict_maps
from almrr_pipeline.inference.inference_config import Thresholds
from almrr_pipeline.inference.tiling import AnomalyMap

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    image_paths: Sequence[Path],
    *,
    image_size: tuple[int, int],
    tiling: Tiling,
    batch_size: int,
    device: torch.device | str = "cpu",
    smoothing: int,
    false_alarm_rate: float,
) -> Thresholds:
    """Choose the image threshold and the pixel threshold of a model.

    Args:
        model: in eval mode and on `device`; as for `predict_maps`.
        image_paths: validation images; never trained on, never from the test set. May be empty: then both
            thresholds are undefined and say why.
        image_size: rows and columns of the network's input.
        tiling: whether and how images are cut.
        batch_size: images, or tiles, that go through the model together.
        device: where the model is.
        smoothing: side of the mean filter of `image_score`, in pixels.
        false_alarm_rate: largest share of normal images that may be called anomalous, in (0, 1).

    Raises:
        AlmrrError: an image cannot be read.
    """
    maps = predict_maps(
        model, image_paths, image_size=image_size, tiling=tiling, batch_size=batch_size, device=device, at="network"
    )
    return choose_thresholds(maps, smoothing=smoothing, false_alarm_rate=false_alarm_rate)


def choose_thresholds(maps: Iterable[AnomalyMap], *, smoothing: int, false_alarm_rate: float) -> Thresholds:
    """Choose both thresholds from the maps of validation images.

    Args:
        maps: float32 in [0, 1], shape (H, W) each, at the network's scale; read one after another.
        smoothing: side of the mean filter of `image_score`, in pixels.
        false_alarm_rate: largest share of normal images that may be called anomalous, in (0, 1).

    Raises:
        AlmrrError: the rate is out of range.
    """
    levels = [(image_score(anomaly_map, smoothing), float(anomaly_map.max())) for anomaly_map in maps]
    scores, peaks = np.array(levels, dtype=np.float64).reshape(-1, 2).T
    thresholds = Thresholds(
        image=conformal_threshold(scores, false_alarm_rate),
        pixel=conformal_threshold(peaks, false_alarm_rate, event="shows an outline though it is normal"),
    )
    logger.info("Thresholds: image %s, pixel %s.", thresholds.image.value, thresholds.pixel.value)
    return thresholds
