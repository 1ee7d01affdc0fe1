"""Batches of a synthetic set.

The batch of a step is a pure function of the seed and the step: a resumed training sees what an
uninterrupted one would have seen, and devices share a batch without communication.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from almrr_pipeline.common.arrays import ImageArray, Indices
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import TrainSettings
from almrr_pipeline.synthesis.synthetic_set import SyntheticSet
from almrr_pipeline.training.augment import FLIPS, TRANSPOSE, apply_symmetries

logger = logging.getLogger(__name__)

RESIDENT_FRACTION = 0.4
"""A synthetic set may take this fraction of a GPU's free memory; the rest is for training."""
LOADER_PROCESSES = 4
"""Loader processes that feed a GPU from disk when `workers` is 0."""


class Batch(TypedDict):
    """Images as in the synthetic set: uint8 (B, H, W, 3); mask: bool or {0, 1} (B, H, W).

    sources: int64 (B,), the rows of the normal images in the synthetic set.
    keys: int64 (2, B), a number for each normal and augmented image in its orientation, equal where
    the image is; normal ones have the numbers below 8 times their count.
    """

    normal: Tensor
    augmented: Tensor
    mask: Tensor
    sources: Tensor
    keys: NotRequired[Tensor]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on all the parts, equal on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class SampleOrder:
    """Samples and augmentation of each step.

    Samples are drawn epoch by epoch, each epoch a new permutation. A batch may reach over the end
    of an epoch, so that every batch is full, also with fewer samples than a batch holds.

    `count` is the number of samples in the synthetic set. `batch_size` is that of a step, over all
    `world_size` processes, and a multiple of their number; `rank` is this process. `flips` and
    `rot90` are drawn at random; rot90 has no effect on images that are not square.
    """

    count: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    flips: bool = True
    rot90: bool = True

    def samples(self, step: int) -> Indices:
        """This process's samples at a step: int64 in [0, count), (batch_size / world_size,)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        positions = positions[self.rank :: self.world_size]
        epochs, places = np.divmod(positions, self.count)
        drawn = np.empty_like(places)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            drawn[of_epoch] = _permute(self.count, self.seed, int(epoch))[places[of_epoch]]
        return drawn

    def symmetries(self, step: int) -> npt.NDArray[np.uint8]:
        """How this process's samples are flipped and rotated at a step; see `apply_symmetries`."""
        generator = np.random.default_rng(derive_seed(self.seed, "turns", step))
        drawn = generator.integers(0, 8, size=self.batch_size, dtype=np.uint8)
        allowed = np.uint8(FLIPS * self.flips | TRANSPOSE * self.rot90)
        return drawn[self.rank :: self.world_size] & allowed


@lru_cache(maxsize=4)  # a batch reaches over two epochs, or over many small ones
def _permute(count: int, seed: int, epoch: int) -> Indices:
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(count)


def to_images(images: Tensor, *, channels_last: bool) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [0, 1], on the same device."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = images.permute(0, 3, 1, 2).to(dtype=torch.float32, memory_format=memory_format)
    return images.div_(255)


class SyntheticBatches(Dataset[Batch]):
    """The batches of all steps, indexed by step.

    With a device, the synthetic set is copied there once and gathered there; else it is gathered
    from the memory map to the CPU.
    """

    def __init__(
        self, synthetic_set: SyntheticSet, order: SampleOrder, *, device: torch.device | None
    ) -> None:
        self._order = order
        self._device = device
        self._normal_index = np.asarray(synthetic_set.normal_index)
        self._normals = len(synthetic_set.normals)
        arrays: dict[str, npt.NDArray[Any]] = {
            "normal": synthetic_set.normals,
            "augmented": synthetic_set.augmented,
            "mask": synthetic_set.masks,
        }
        self._mapped = {} if device else arrays
        self._resident = {k: _copy(array, device) for k, array in arrays.items()} if device else {}

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, on the synthetic set's device."""
        samples = self._order.samples(step)
        drawn = self._order.symmetries(step)
        # In one tensor, so that a GPU gets them by one copy that the host does not wait for.
        numbers = torch.from_numpy(np.stack([self._normal_index[samples], samples, drawn]))
        if self._device is not None and self._device.type == "cuda":
            numbers = numbers.pin_memory()
        normal, augmented, symmetries = numbers.to(self._device or "cpu", non_blocking=True)
        rows = {"normal": normal, "augmented": augmented, "mask": augmented}
        gathered = {name: self._gather(name, indices) for name, indices in rows.items()}
        if drawn.any():
            gathered = {k: apply_symmetries(images, symmetries) for k, images in gathered.items()}
        gathered["sources"] = normal
        if symmetries.device.type == "cpu":  # a GPU keeps no features
            height, width = gathered["mask"].shape[1:]
            oriented = symmetries if height == width else symmetries & FLIPS
            images = torch.stack([normal, augmented + self._normals])
            gathered["keys"] = 8 * images + oriented
        return cast(Batch, gathered)

    def _gather(self, name: str, indices: Tensor) -> Tensor:
        if self._device is None:
            return torch.from_numpy(np.ascontiguousarray(self._mapped[name][indices.numpy()]))
        return self._resident[name].index_select(0, indices)

    def __getstate__(self) -> dict[str, Any]:
        """For spawned loader processes: a memory map is sent as its file's name."""
        mapped: dict[str, Any] = dict(self._mapped)
        for name, array in mapped.items():
            if isinstance(array, np.memmap) and array.filename is not None:
                mapped[name] = (array.filename, array.dtype, "r", array.offset, array.shape)
        return {**self.__dict__, "_mapped": mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name, array in state["_mapped"].items():
            self._mapped[name] = np.memmap(*array) if isinstance(array, tuple) else array


def _copy(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy in slices, so that a memory-mapped array is never in main memory as a whole."""
    dtype = torch.from_numpy(array[:0].copy()).dtype
    copied = torch.empty(array.shape, dtype=dtype, device=device)
    rows = max(1, 2**28 // max(1, array[:1].nbytes))  # slices of 256 MiB
    for start in range(0, len(array), rows):
        copied[start : start + rows] = torch.from_numpy(np.array(array[start : start + rows]))
    return copied


def check_synthetic_set(synthetic_set: SyntheticSet, *, image_size: tuple[int, int]) -> None:
    """Raise an AlmrrError if a synthetic set is empty, inconsistent or not of the image size."""
    normals, masks = synthetic_set.normals, synthetic_set.masks
    index, count = synthetic_set.normal_index, len(synthetic_set.augmented)
    if count == 0 or len(normals) == 0:
        raise AlmrrError("The synthetic set is empty; run the synthesize stage with samples > 0.")
    if not (len(masks) == len(index) == count):
        raise AlmrrError(
            f"The synthetic set is inconsistent: {count} augmented images, {len(masks)} masks and "
            f"{len(index)} normal indices; run the synthesize stage again."
        )
    if index.min() < 0 or index.max() >= len(normals):
        raise AlmrrError(
            f"The synthetic set is inconsistent: normal indices {index.min()} to {index.max()} "
            f"for {len(normals)} normal images; run the synthesize stage again."
        )
    sizes = {tuple(array.shape[1:3]) for array in (normals, synthetic_set.augmented, masks)}
    if sizes != {tuple(image_size)}:
        raise AlmrrError(
            f"The synthetic set's images have the size {' and '.join(map(str, sorted(sizes)))}, "
            f"the model's input is {tuple(image_size)}; run the synthesize stage with the same "
            "data.image_size."
        )


def choose_residence(synthetic_set: SyntheticSet, device: torch.device) -> torch.device | None:
    """The device to copy the synthetic set to: a GPU with room for it, else None."""
    if device.type != "cuda":
        return None
    arrays = (synthetic_set.normals, synthetic_set.augmented, synthetic_set.masks)
    size, (free, _) = sum(array.nbytes for array in arrays), torch.cuda.mem_get_info(device)
    resident = size <= RESIDENT_FRACTION * free
    where = "copied to the GPU" if resident else "read from disk ahead of use"
    line = "Synthetic set of %.2f GB, %.2f GB of GPU memory free: %s."
    logger.info(line, size / 1e9, free / 1e9, where)
    return device if resident else None


def choose_workers(workers: int, *, device: torch.device, resident: bool) -> int:
    """Loader processes: none for a resident synthetic set; else `workers`, or 4 per GPU if it is 0.

    On a CPU a batch gathered from the memory map costs a thousandth of a step, so 0 means none.
    """
    if resident:
        return 0
    if workers == 0 and device.type == "cuda":
        return min(LOADER_PROCESSES, os.cpu_count() or 1)
    return workers


def sample_normals(normals: ImageArray, limit: int) -> Iterator[Tensor]:
    """Up to `limit` of the images, evenly spread, by eight: float32 (b, 3, H, W) in [0, 1]."""
    count = len(normals)
    chosen = np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(np.int64))
    for start in range(0, len(chosen), 8):
        images = normals[chosen[start : start + 8]]
        yield to_images(torch.from_numpy(np.ascontiguousarray(images)), channels_last=False)


def number_owners(synthetic_set: SyntheticSet, specimens: Mapping[str, str]) -> Tensor:
    """For each normal image of the set, int64 (n,), a number of what it shows.

    Equal for crops of one image and for images of one specimen.

    Args:
        synthetic_set: whose images are named in its description.
        specimens: the specimen of each named image that has one.
    """
    count = len(synthetic_set.normals)
    images = synthetic_set.description.get("training_images") or [str(k) for k in range(count)]
    shown = [specimens.get(image) or image for image in images]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(shown))}
    return torch.tensor([numbers[shown[row % len(shown)]] for row in range(count)])


def draw_normals(
    synthetic_set: SyntheticSet, owners: Tensor, settings: TrainSettings, *, count: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """So many normal images, evenly spread, flipped and rotated as training does, by eight.

    Yields:
        Images, float32 (b, 3, H, W) in [0, 1], and their owners, int64 (b,).
    """
    order = SampleOrder(8, 8, derive_seed(seed, "memory"), 0, 1, settings.flips, settings.rot90)
    last = len(synthetic_set.normals) - 1
    chosen = np.linspace(0, last, count).round().astype(np.int64)
    for start in range(0, count, 8):
        rows = chosen[start : start + 8]
        images = torch.from_numpy(np.ascontiguousarray(synthetic_set.normals[rows]))
        turns = torch.from_numpy(order.symmetries(start)[: len(rows)])
        yield to_images(apply_symmetries(images, turns), channels_last=False), owners[rows]


def build_loader(
    synthetic_set: SyntheticSet, settings: TrainSettings, fabric: Fabric, *, seed: int, first: int
) -> DataLoader[Batch]:
    """This process's batches of the steps from `first` on, read ahead where that pays."""
    order = SampleOrder(
        len(synthetic_set.augmented),
        batch_size=settings.batch_size,
        seed=seed,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        flips=settings.flips,
        rot90=settings.rot90,
    )
    residence = choose_residence(synthetic_set, fabric.device)
    resident = residence is not None
    workers = choose_workers(settings.workers, device=fabric.device, resident=resident)
    return DataLoader(
        SyntheticBatches(synthetic_set, order, device=residence),
        batch_size=None,  # an item is a whole batch
        sampler=range(first, settings.steps),
        num_workers=workers,
        pin_memory=fabric.device.type == "cuda" and not resident,  # copies overlap with computing
        prefetch_factor=4 if workers else None,
    )
