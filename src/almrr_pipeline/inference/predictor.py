"""From images to anomaly maps, scores and verdicts, in bounded memory, whatever the images' number and size."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.ndimage import uniform_filter
from torch import nn

from almrr_pipeline.config import Tiling
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import ImageArray, read_image, resize_image
from almrr_pipeline.inference.tta import average_flips
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.streams import map_ahead, take_batches
from almrr_pipeline.inference.tiling import AnomalyMap, Blend, TileGrid
from almrr_pipeline.model.almrr import ALMRR

logger = logging.getLogger(__name__)

ImageInput: TypeAlias = str | os.PathLike[str] | ImageArray
"""The path of an image, or its pixels as uint8 RGB of shape (H, W, 3)."""

_LARGE_IMAGES_AHEAD = 2
"""Images decoded ahead in tiling mode, where one alone fills batches."""


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image."""

    anomaly_map: AnomalyMap
    """float32 in [0, 1], of the image's own size (H, W)."""
    score: float
    """Anomaly score of the image, in [0, 1]; see `image_score`."""
    is_anomalous: bool | None
    """Whether the score lies above the image threshold; None where there is no threshold."""


class Predictor:
    """A trained model, fused for inference, that takes images of any size and number."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "auto",
        batch_size: int = 8,
        scan_backend: str = "auto",
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
    ) -> None:
        """Load a model folder.

        Args:
            folder: holds model.safetensors, config.json and inference.json.
            device: auto (CUDA where there is one, else the CPU), or a name of torch's such as cpu, cuda:1 or mps.
            batch_size: images, or tiles, that go through the network together.
            scan_backend: implementation of the selective scan; see `almrr_pipeline.model.kernels.scan`.
            image_threshold: in place of the model's own.
            pixel_threshold: in place of the model's own.

        Raises:
            AlmrrError: the folder holds no model, or the device or the backend is not there.
        """
        self.settings = InferenceConfig.load(folder)
        self.device = resolve_device(device)
        self.batch_size = batch_size
        stored = self.settings.thresholds
        self.image_threshold = stored.image.value if stored and image_threshold is None else image_threshold
        """What an image's score has to exceed to be anomalous; None leaves the verdict open."""
        self.pixel_threshold = stored.pixel.value if stored and pixel_threshold is None else pixel_threshold
        """What a map's value has to exceed to lie inside an outline; None draws none."""
        model = ALMRR.load(folder, scan_backend=scan_backend)
        if model.image_size != self.settings.image_size:
            raise AlmrrError(
                f"{folder}: config.json is of a model for images of {model.image_size}, inference.json says "
                f"{self.settings.image_size}; they belong to different models. Train again."
            )
        # Fused on the CPU: it composes in float64, which MPS lacks, and compares results, which TF32 would blur.
        self._model = average_flips(model.fuse(), self.settings.flips).to(self.device)

    def __call__(self, images: Iterable[ImageInput]) -> list[Prediction]:
        """Predict all of `images`; the maps of all of them are held at once, so prefer `stream` for very many.

        Raises:
            AlmrrError: as `stream`.
        """
        return list(self.stream(images))

    def stream(self, images: Iterable[ImageInput]) -> Iterator[Prediction]:
        """Predict images as they come, in their order; the next ones are decoded meanwhile.

        Args:
            images: paths, or uint8 RGB arrays of shape (H, W, 3); sizes may differ.

        Raises:
            AlmrrError: an image cannot be read, or an array is no image; names which.
        """
        for outcome in self.try_stream(images):
            if isinstance(outcome, AlmrrError):
                raise outcome
            yield outcome

    def try_stream(self, images: Iterable[ImageInput]) -> Iterator[Prediction | AlmrrError]:
        """As `stream`, but in an image's place comes the error that keeps it from being read, and the others go on."""
        outcomes = _stream_maps(
            self._model,
            images,
            image_size=self.settings.image_size,
            tiling=self.settings.tiling,
            batch_size=self.batch_size,
            device=self.device,
        )
        return (outcome if isinstance(outcome, AlmrrError) else self._judge(outcome) for outcome in outcomes)

    def maps(self, images: Iterable[ImageInput], *, at: Literal["network", "image"]) -> Iterator[AnomalyMap]:
        """Maps alone, as `predict_maps` gives them for this model."""
        return predict_maps(
            self._model,
            images,
            image_size=self.settings.image_size,
            tiling=self.settings.tiling,
            batch_size=self.batch_size,
            device=self.device,
            at=at,
        )

    def _judge(self, mapped: _MappedImage) -> Prediction:
        score = image_score(mapped.anomaly_map, self.settings.smoothing)
        return Prediction(
            anomaly_map=_resize_map(mapped.anomaly_map, mapped.size),
            score=score,
            is_anomalous=None if self.image_threshold is None else score > self.image_threshold,
        )


def predict_maps(
    model: nn.Module,
    images: Iterable[ImageInput],
    *,
    image_size: tuple[int, int],
    tiling: Tiling,
    batch_size: int,
    device: torch.device | str,
    at: Literal["network", "image"],
) -> Iterator[AnomalyMap]:
    """Compute the anomaly maps of images as they come, in their order.

    Without tiling an image is resized to `image_size` (the paper's way). With tiling it is resized by
    `tiling.scale`, cut into overlapping tiles of `image_size`, and the tiles' maps are blended; see
    `almrr_pipeline.inference.tiling`.

    Args:
        model: in eval mode and on `device`; takes float32 in [0, 1] of shape (B, 3, H, W), returns (B, H, W).
        images: paths, or uint8 RGB arrays of shape (H, W, 3); sizes may differ.
        image_size: rows and columns of the network's input.
        tiling: whether and how images are cut.
        batch_size: images, or tiles, that go through the model together; tiles of different images share a batch.
        device: where the model is.
        at: "network" gives maps of the resized or scaled image's size, "image" of the image's own.

    Yields:
        float32 in [0, 1], shape (h, w).

    Raises:
        AlmrrError: an image cannot be read or is no image, or the model's output is not finite.
    """
    outcomes = _stream_maps(
        model, images, image_size=image_size, tiling=tiling, batch_size=batch_size, device=torch.device(device)
    )
    for outcome in outcomes:
        if isinstance(outcome, AlmrrError):
            raise outcome
        yield outcome.anomaly_map if at == "network" else _resize_map(outcome.anomaly_map, outcome.size)


def image_score(anomaly_map: AnomalyMap, smoothing: int) -> float:
    """Score an image: the largest mean over windows of `smoothing` x `smoothing` pixels of its map.

    There is a window around every pixel; at the border the mean is taken over the pixels that lie inside the image.
    A window of even side reaches one pixel further up and left.

    Args:
        anomaly_map: float32 in [0, 1], shape (H, W), at the network's scale.
        smoothing: the window's side, in pixels; 1 gives the map's maximum.

    Returns:
        A value in [0, 1].
    """
    total = uniform_filter(anomaly_map.astype(np.float64), smoothing, mode="constant")
    inside = [uniform_filter(np.ones(length), smoothing, mode="constant") for length in anomaly_map.shape]
    return float((total / np.outer(*inside)).max())


def resolve_device(name: str) -> torch.device:
    """Find a device by name; "auto" is the first CUDA device, or the CPU where there is none.

    Raises:
        AlmrrError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.info("Device: %s.", device)
        return device
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise AlmrrError(
            f"The device {name!r} cannot be used here ({reason}); take auto, cpu, cuda or cuda:N."
        ) from error
    return device


@dataclass(frozen=True)
class _PreparedImage:
    """An image at the network's scale, and the size it had."""

    pixels: ImageArray
    size: tuple[int, int]


@dataclass(frozen=True)
class _MappedImage:
    """An image's map at the network's scale, and the size the image had."""

    anomaly_map: AnomalyMap
    size: tuple[int, int]


@dataclass(frozen=True)
class _PendingImage:
    """An image of which not all tiles have been through the network."""

    blend: Blend
    size: tuple[int, int]


def _stream_maps(
    model: nn.Module,
    images: Iterable[ImageInput],
    *,
    image_size: tuple[int, int],
    tiling: Tiling,
    batch_size: int,
    device: torch.device,
) -> Iterator[_MappedImage | AlmrrError]:
    """Decode ahead, cut, predict in batches that span images, blend; an unreadable image becomes its error."""
    if isinstance(images, str | os.PathLike) or (isinstance(images, np.ndarray) and images.ndim == 3):
        raise AlmrrError("One image was given where several are expected; put it into a list.")
    if batch_size < 1:
        raise AlmrrError(f"The batch size is {batch_size}; it has to be 1 or more.")
    if model.training:
        raise ValueError("the model is in training mode, where its maps are random; call model.eval() first")
    prepare = partial(_try_prepare, image_size=image_size, tiling=tiling)
    ahead = _LARGE_IMAGES_AHEAD if tiling.enabled else 2 * batch_size
    prepared = map_ahead(prepare, enumerate(images), ahead=ahead)
    waiting: deque[_PendingImage | AlmrrError] = deque()
    tiles = _cut_tiles(prepared, waiting, tile=image_size, overlap=tiling.overlap)
    for batch in take_batches(tiles, batch_size):
        maps = _predict_batch(model, np.stack([tile for tile, _ in batch]), device)
        for (_, blend), tile_map in zip(batch, maps, strict=True):
            blend.add(tile_map)
        yield from _take_finished(waiting)
    yield from _take_finished(waiting)


def _try_prepare(
    numbered: tuple[int, ImageInput], *, image_size: tuple[int, int], tiling: Tiling
) -> _PreparedImage | AlmrrError:
    """Decode and scale one image; what is wrong with it comes back as a value, to be told in its turn."""
    try:
        pixels = _decode(*numbered)
    except AlmrrError as error:
        return error
    size = (pixels.shape[0], pixels.shape[1])
    scaled = [max(1, round(length * tiling.scale)) for length in size]
    target = (scaled[0], scaled[1]) if tiling.enabled else image_size
    return _PreparedImage(resize_image(pixels, target), size)


def _decode(position: int, image: ImageInput) -> ImageArray:
    if not isinstance(image, np.ndarray):
        return read_image(Path(image))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise AlmrrError(
            f"ImageInput {position} (counted from 0) is an array of {image.dtype} with shape {image.shape}; "
            "expected RGB values in [0, 255] as uint8 with shape (rows, columns, 3)."
        )
    return image


def _cut_tiles(
    prepared: Iterable[_PreparedImage | AlmrrError],
    waiting: deque[_PendingImage | AlmrrError],
    *,
    tile: tuple[int, int],
    overlap: float,
) -> Iterator[tuple[ImageArray, Blend]]:
    """Yield every tile with the blend it belongs to, and put each image, in order, on the queue of those waiting."""
    for image in prepared:
        if isinstance(image, AlmrrError):
            waiting.append(image)
            continue
        rows, columns = image.pixels.shape[:2]
        grid = TileGrid((rows, columns), tile=tile, overlap=overlap)
        blend = Blend(grid)
        waiting.append(_PendingImage(blend, image.size))
        for pixels in grid.cut(image.pixels):
            yield pixels, blend


def _take_finished(waiting: deque[_PendingImage | AlmrrError]) -> Iterator[_MappedImage | AlmrrError]:
    """Take from the front of the queue what is finished."""
    while waiting and (isinstance(waiting[0], AlmrrError) or waiting[0].blend.complete):
        head = waiting.popleft()
        yield head if isinstance(head, AlmrrError) else _MappedImage(head.blend.result(), head.size)


@torch.inference_mode()
def _predict_batch(model: nn.Module, tiles: npt.NDArray[np.uint8], device: torch.device) -> AnomalyMap:
    """Maps of a batch of tiles; uint8 (B, H, W, 3) in, float32 (B, H, W) out."""
    pixels = torch.from_numpy(tiles).to(device)  # a quarter of what floats would move
    images = pixels.permute(0, 3, 1, 2).float().div_(255)  # (B, 3, H, W)
    try:
        maps = np.asarray(model(images).float().cpu(), dtype=np.float32)
    except torch.OutOfMemoryError as error:
        raise AlmrrError(
            f"A batch of {len(tiles)} does not fit into {device}'s memory; lower the batch size."
        ) from error
    if not np.isfinite(maps).all():
        raise AlmrrError(
            "The model's anomaly map holds values that are not finite: its weights are damaged; train it again."
        )
    return maps


def _resize_map(anomaly_map: AnomalyMap, size: tuple[int, int]) -> AnomalyMap:
    """Resize to `size` = (rows, columns) as images are resized: bilinear, antialiased, pixel centers aligned."""
    if anomaly_map.shape == size:
        return anomaly_map
    resized: AnomalyMap = np.array(Image.fromarray(anomaly_map).resize(size[::-1], Image.Resampling.BILINEAR))
    return resized.clip(0.0, 1.0)  # rounding alone can leave [0, 1]
