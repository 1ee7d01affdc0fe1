"""From images to scores and verdicts, by the files of a model folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import uniform_filter

from almrr_pipeline.common.arrays import AnomalyMap, release_pages, return_free_memory
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import InferenceSettings
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.map_predictor import (
    ImageInput,
    MapPredictor,
    OnUnreadable,
    raise_unreadable,
)
from almrr_pipeline.inference.runtimes import ExportedNetwork, cached_graph, import_runtime
from almrr_pipeline.model.almrr import ALMRR

_LARGE_MAP = 16_000_000  # pixels; larger ones are smoothed in bands
_BAND = 128  # rows


@dataclass(frozen=True)
class Prediction:
    """Anomaly map, score and verdict of one image."""

    anomaly_map: AnomalyMap  # float32 in [0, 1], of the image's own size (H, W)
    score: float  # anomaly score of the image, in [0, 1]; see `image_score`
    is_anomalous: bool | None  # whether the score is above the threshold; None where there is none
    index: int = 0  # position of the image among those given, from 0
    unlike: tuple[str, ...] = ()  # in what it is far from the calibration's images: "darker", ...


class Predictor:
    """A trained model with its thresholds, fused for inference.

    Attributes:
        config: what inference.json holds.
        map_predictor: the network; gives the maps alone.
        image_threshold: an image with a score above it is anomalous; None leaves the verdict open.
        pixel_threshold: pixels with a value above it are outlined; None outlines none.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        device: str = "auto",
        batch_size: int = 8,
        scan_backend: str = "auto",
        runtime: str = "torch",
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        """Load a model folder.

        Args:
            folder: holds model.safetensors, config.json and inference.json.
            device: auto (CUDA where there is one, else the CPU), or a name of torch's such as cpu,
                cuda:1 or mps.
            batch_size: images, or tiles, per forward pass; at least 1.
            scan_backend: implementation of the selective scan.
            runtime: torch, or onnxruntime or openvino, which run on the CPU a graph that is
                exported at first use (`almrr_pipeline.inference.runtimes`).
            image_threshold: in place of the model's own, in [0, 1].
            pixel_threshold: in place of the model's own, in [0, 1].
            value_range: black and white of images of more than 8 bits, in place of the model's own.

        Raises:
            AlmrrError: the folder holds no model, the device or the backend is not there, or a
                number is out of its range.
        """
        folder = Path(folder)
        self.config = InferenceConfig.load(folder)
        if value_range is not None:
            self.config = self.config.with_range(value_range)
        self.image_threshold, self.pixel_threshold = image_threshold, pixel_threshold
        for threshold in (image_threshold, pixel_threshold):
            if threshold is not None and not 0.0 <= threshold <= 1.0:  # nan neither
                raise AlmrrError(
                    f"The threshold {threshold} is not between 0 and 1, as scores are."
                )
        if batch_size < 1:
            raise AlmrrError(f"The batch size {batch_size} is not at least 1.")
        stored = self.config.thresholds
        if stored and image_threshold is None:
            self.image_threshold = stored.image.value
        if stored and pixel_threshold is None:
            self.pixel_threshold = stored.pixel.value
        model = ALMRR.load(folder, scan_backend=scan_backend)
        if model.image_size != self.config.image_size:
            raise AlmrrError(
                f"{folder}: config.json is of a model for images of {model.image_size}, "
                f"inference.json of one for {self.config.image_size}; they belong to different "
                "models. Train again."
            )
        maps = self._build_maps(folder, model, runtime, device)
        reading, region = self.config.reading, self.config.region
        self.map_predictor = replace(maps, batch_size=batch_size, reading=reading, region=region)

    def _build_maps(self, folder: Path, model: ALMRR, runtime: str, device: str) -> MapPredictor:
        flips, tiling = self.config.flips, self.config.tiling
        if runtime == "torch":
            settings = InferenceSettings(flips=flips)
            return MapPredictor.build(model, settings, tiling=tiling, device=device)
        if device not in {"auto", "cpu"}:
            raise AlmrrError(f"The runtime {runtime} runs on the CPU, not on {device}; take torch.")
        import_runtime(runtime)  # before the export, which takes half a minute
        network = ExportedNetwork(cached_graph(folder, model, flips=flips), runtime)
        return MapPredictor(network, model.image_size, tiling, 1, torch.device("cpu"))

    def __call__(self, images: Iterable[ImageInput]) -> list[Prediction]:
        """Predict all of `images` and hold all their maps at once; `stream` holds a few."""
        return list(self.stream(images))

    def stream(
        self, images: Iterable[ImageInput], *, on_unreadable: OnUnreadable = raise_unreadable
    ) -> Iterator[Prediction]:
        """Predict images as they come, in their order; the next ones are decoded meanwhile.

        Args:
            images: paths, or uint8 RGB arrays of shape (H, W, 3); sizes may differ.
            on_unreadable: called, in its turn, with an image that cannot be read and the reason;
                the others go on, and `Prediction.index` tells which they are. Raises by default.

        Raises:
            AlmrrError: an image cannot be read, or an array is no image; names which.
        """
        stored = self.config.thresholds
        usual = stored.usual if stored else None
        for scaled in self.map_predictor.maps(images, on_unreadable=on_unreadable):
            score = image_score(scaled.anomaly_map, self.config.smoothing)
            verdict = None if self.image_threshold is None else score > self.image_threshold
            unlike = usual.differences(scaled.look) if usual else ()
            if scaled.region and not scaled.region.fits(scaled.size):
                unlike += ("of other proportions",)
            return_free_memory(scaled.anomaly_map)  # of the network, before its image is drawn
            yield Prediction(scaled.at_image_size(), score, verdict, scaled.index, unlike)


def image_score(anomaly_map: AnomalyMap, smoothing: int) -> float:
    """Score an image: the largest mean over windows of `smoothing` x `smoothing` pixels of its map.

    There is a window around every pixel; at the border the mean is taken over the pixels inside the
    image. A window of even side reaches one pixel further up and left.

    Args:
        anomaly_map: float32 in [0, 1], shape (H, W), at the network's scale.
        smoothing: the window's side, in pixels; 1 gives the map's maximum, in [0, 1] as any score.
    """
    smooth = partial(uniform_filter, size=smoothing, mode="constant")
    rows, columns = (smooth(np.ones(length)) for length in anomaly_map.shape)  # of the windows
    height = len(anomaly_map) if anomaly_map.size <= _LARGE_MAP else _BAND
    largest = 0.0
    for top in range(0, len(anomaly_map), height):
        first = max(0, top - smoothing)  # all rows that windows of this band reach
        around = anomaly_map[first : top + height + smoothing].astype(np.float64)
        band = smooth(around)[top - first :][:height]
        largest = max(largest, (band / np.outer(rows[top : top + height], columns)).max())
        release_pages(anomaly_map)
    return float(largest)
