"""From images to anomaly maps, in bounded memory, whatever the images' number and size.

The way of an image: decode (in threads) -> resize or scale -> cut into tiles -> batches, which
tiles of several images share -> network (on a CPU several batches at a time) -> blend -> map at the
network's scale.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from almrr_pipeline.common.arrays import AnomalyMap, ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import Reading, read_image
from almrr_pipeline.common.region import Region, resize_counted
from almrr_pipeline.config import InferenceSettings, Tiling
from almrr_pipeline.inference.fuse import fuse
from almrr_pipeline.inference.looks import Look, measure_look
from almrr_pipeline.inference.streams import submit_ahead, take_batches
from almrr_pipeline.inference.threads import batches_at_once, start_torch_workers
from almrr_pipeline.inference.tiling import Blend, TileGrid
from almrr_pipeline.inference.tta import average_flips
from almrr_pipeline.model.almrr import ALMRR

logger = logging.getLogger(__name__)

ImageInput: TypeAlias = str | os.PathLike[str] | ImageArray
"""The path of an image, or its pixels as uint8 RGB of shape (H, W, 3)."""
OnUnreadable: TypeAlias = Callable[[ImageInput, AlmrrError], None]
"""Called with an image that cannot be read and the reason, in the image's turn."""
_LARGE_IMAGES_AHEAD = 2  # decoded ahead in tiling mode, where one image alone fills batches


def raise_unreadable(image: ImageInput, error: AlmrrError) -> None:
    """End at the first image that cannot be read: the default of `on_unreadable`."""
    raise error


@dataclass(frozen=True)
class ScaledMap:
    """An anomaly map at the network's scale."""

    index: int  # position of its image among those given, from 0
    anomaly_map: AnomalyMap  # float32 in [0, 1], shape (h, w)
    size: tuple[int, int]  # rows and columns (H, W) of the image itself
    look: Look  # of the image at the network's scale
    region: Region | None = None  # outside of which the map is 0

    def at_image_size(self) -> AnomalyMap:
        """Resize to the image's own size, as images are: bilinear, antialiased, centers aligned."""
        if self.anomaly_map.shape == self.size:
            return self.anomaly_map
        image = Image.fromarray(self.anomaly_map)
        resized = np.array(image.resize(self.size[::-1], Image.Resampling.BILINEAR))
        resized.clip(0.0, 1.0, out=resized)  # rounding alone can leave [0, 1]
        return resized if self.region is None else self.region.cut(resized)


@dataclass(frozen=True)
class MapPredictor:
    """A network with all that it takes to map images of any size and number.

    Without tiling an image is resized to `image_size` (the paper's way). With tiling it is resized
    by `tiling.scale`, cut into overlapping tiles of `image_size`, and the tiles' maps are blended;
    see `almrr_pipeline.inference.tiling`.
    """

    model: nn.Module  # in evaluation mode, on `device`: (B, 3, H, W) -> (B, H, W), in [0, 1]
    image_size: tuple[int, int]  # rows and columns of the network's input
    tiling: Tiling
    batch_size: int  # images, or tiles, per forward pass; tiles of different images share a batch
    device: torch.device
    reading: Reading | None = None  # of the files' values
    region: Region | None = None  # outside of it images are blank and maps 0
    concurrent: bool = True  # whether threads may call the model at the same time, in any order

    def __post_init__(self) -> None:
        """Refuse values that no image can be mapped with."""
        if self.batch_size < 1:
            raise AlmrrError(f"The batch size is {self.batch_size}; it has to be 1 or more.")

    @classmethod
    def build(
        cls,
        model: ALMRR,
        settings: InferenceSettings,
        *,
        tiling: Tiling,
        device: str = "auto",
        reading: Reading | None = None,
        region: Region | None = None,
    ) -> Self:
        """Fuse a model, average over flips if the settings ask for it, and move it to a device.

        Args:
            model: on the CPU; stays as it is. Its scan backend is kept.
            settings: of these batch_size and flips.
            tiling: whether and how images are cut.
            device: as for `resolve_device`, which may raise AlmrrError.
            reading: how image files become 8-bit RGB.
            region: what of the images counts; None for all.
        """
        target = resolve_device(device)
        network = average_flips(fuse(model), settings.flips).to(target)
        size, batch_size = model.image_size, settings.batch_size
        return cls(network, size, tiling, batch_size, target, reading, region)

    def maps(
        self, images: Iterable[ImageInput], *, on_unreadable: OnUnreadable = raise_unreadable
    ) -> Iterator[ScaledMap]:
        """Compute the anomaly maps of images as they come, in their order.

        On a CPU up to four batches are computed at a time, each by its part of torch's threads; a
        single batch has them all.

        Args:
            images: paths, or uint8 RGB arrays of shape (H, W, 3); sizes may differ.
            on_unreadable: called in place of yielding a map; raises the error by default.

        Raises:
            AlmrrError: an image cannot be read or is no image, the model's output is not finite, or
                a batch does not fit into memory.
        """
        lone_array = isinstance(images, np.ndarray) and images.ndim == 3
        if lone_array or isinstance(images, str | os.PathLike):
            raise AlmrrError("One image was given where several are expected; put it into a list.")
        if self.model.training:
            raise ValueError("the model is in training mode: its maps are random; call eval()")
        ahead = _LARGE_IMAGES_AHEAD if self.tiling.enabled else 2 * self.batch_size
        decoded = submit_ahead(self._decode_and_scale, enumerate(images), ahead=ahead)
        pending: deque[_Decoding] = deque()
        batches = take_batches(_cut_tiles(decoded, pending), self.batch_size)
        for batch, maps in self._map_batches(batches):
            for (_, blend), tile_map in zip(batch, maps, strict=True):
                blend.add(tile_map)
            yield from self._take_finished(pending, on_unreadable)
        yield from self._take_finished(pending, on_unreadable)

    def _decode_and_scale(self, numbered: tuple[int, ImageInput]) -> _ScaledImage:
        pixels = _decode(*numbered, self.reading)
        size, target = (pixels.shape[0], pixels.shape[1]), self.image_size
        if self.tiling.enabled:
            rows, columns = (max(1, round(length * self.tiling.scale)) for length in size)
            target = (rows, columns)
        grid = TileGrid(target, tile=self.image_size, overlap=self.tiling.overlap)
        scaled = resize_counted(pixels, target, self.region)
        seen = scaled if self.region is None else scaled[self.region.box(target)]
        return _ScaledImage(scaled, size, Blend(grid), measure_look(seen))

    def _map_batches(self, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, _Maps]]:
        """Yield each batch with its maps, in order; on a CPU the next ones are mapped meanwhile."""
        first = list(islice(batches, 2))
        batches, at_once = chain(first, batches), batches_at_once()
        if at_once == 1 or len(first) < 2 or self.device.type != "cpu" or not self.concurrent:
            yield from ((batch, self._map_batch(batch)) for batch in batches)
            return
        start = partial(start_torch_workers, threads=torch.get_num_threads() // at_once)
        mapped = submit_ahead(self._map_batch, batches, ahead=at_once, threads=at_once, start=start)
        yield from ((batch, maps.result()) for batch, maps in mapped)

    @torch.inference_mode()
    def _map_batch(self, batch: _Batch) -> _Maps:
        """Map a batch of tiles: uint8 (B, H, W, 3) -> float32 (B, H, W)."""
        tiles = np.stack([tile for tile, _ in batch])
        pixels = torch.from_numpy(tiles).to(self.device)  # a quarter of what floats would move
        images = pixels.permute(0, 3, 1, 2).float().div_(255)  # (B, 3, H, W)
        try:
            maps = np.asarray(self.model(images).float().cpu(), dtype=np.float32)
        except torch.OutOfMemoryError as error:
            raise AlmrrError(
                f"A batch of {len(tiles)} does not fit into {self.device}'s memory; "
                "lower the batch size."
            ) from error
        if not np.isfinite(maps).all():
            raise AlmrrError(
                "The model's anomaly map holds values that are not finite: its weights are "
                "damaged; train it again."
            )
        return maps

    def _take_finished(
        self, pending: deque[_Decoding], on_unreadable: OnUnreadable
    ) -> Iterator[ScaledMap]:
        """Take from the front of the queue what is finished; report what cannot be read."""
        while pending:
            (index, image), decoding = pending[0]
            if decoding.exception() is None and not decoding.result().blend.complete:
                return
            pending.popleft()
            try:
                scaled = decoding.result()
            except AlmrrError as error:
                on_unreadable(image, error)
                continue
            anomaly_map, region = scaled.blend.result(), self.region
            if region is not None:
                anomaly_map = region.cut(anomaly_map)
            yield ScaledMap(index, anomaly_map, scaled.size, scaled.look, region)


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
        torch.ones(1, device=device).item()  # RuntimeError for meta, which holds no values
    except Exception as error:  # of another device's module, where it is not compiled in
        reason = str(error).partition("\n")[0]
        raise AlmrrError(
            f"The device {name!r} cannot be used here ({reason}); take auto, cpu, cuda or cuda:N."
        ) from error
    return device


class _ScaledImage(NamedTuple):
    """An image at the network's scale, its own size, the map that its tiles add to, its look."""

    pixels: ImageArray
    size: tuple[int, int]
    blend: Blend
    look: Look


_Batch: TypeAlias = list[tuple[ImageArray, Blend]]
"""Tiles, uint8 (H, W, 3), each with the blend that its map is added to."""
_Maps: TypeAlias = npt.NDArray[np.float32]
_Decoding: TypeAlias = tuple[tuple[int, ImageInput], Future[_ScaledImage]]
"""An image, numbered, and what its decoding gives: pixels, or the reason why it cannot be read."""


def _cut_tiles(
    decoded: Iterable[_Decoding], pending: deque[_Decoding]
) -> Iterator[tuple[ImageArray, Blend]]:
    """Yield every tile with its image's blend; put each image, in order, on `pending`."""
    for image, decoding in decoded:
        pending.append((image, decoding))
        if decoding.exception() is None:
            scaled = decoding.result()
            for tile in scaled.blend.grid.cut(scaled.pixels):
                yield tile, scaled.blend


def _decode(index: int, image: ImageInput, reading: Reading | None) -> ImageArray:
    if not isinstance(image, np.ndarray):
        return read_image(Path(image), reading)
    if image.dtype != np.uint8 or image.shape[2:] != (3,) or image.size == 0:
        raise AlmrrError(
            f"Image {index} (counted from 0) is an array of {image.dtype} with shape "
            f"{image.shape}; expected RGB in [0, 255] as uint8 with shape (rows, columns, 3)."
        )
    return image
