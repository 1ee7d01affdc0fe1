"""From the synthetic set to batches: which samples, turned how, read from where.

The batch of a step is a pure function of the seed and the step. Nothing has to be remembered between steps, so a
resumed training sees what an uninterrupted one would have seen, and several devices share a batch without talking.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.training.randomness import derive_seed

logger = logging.getLogger(__name__)

RESIDENT_SHARE = 0.4
"""The synthetic set may take this share of a GPU's free memory; the rest is for training."""
LOADER_PROCESSES = 4
"""Loader processes that feed a GPU from disk when the number is left open."""

_MIRRORS = 0b011
_SWAP = 0b100
"""Bits of a turn, as `turn` reads them."""

Indices = npt.NDArray[np.int64]
Turns = npt.NDArray[np.uint8]


class TrainingSet(Protocol):
    """What training reads of a synthetic set; synthesis.pool.Pool has it.

    The arrays may be memory-mapped. The held ones come from normal images that are not trained on; may be empty.
    """

    @property
    def normals(self) -> npt.NDArray[np.uint8]:
        """RGB, shape (n, H, W, 3)."""

    @property
    def augmented(self) -> npt.NDArray[np.uint8]:
        """RGB, shape (N, H, W, 3)."""

    @property
    def masks(self) -> npt.NDArray[Any]:
        """Bool or {0, 1}, shape (N, H, W)."""

    @property
    def normal_index(self) -> npt.NDArray[np.int64]:
        """Which normal image was augmented, shape (N,)."""

    @property
    def validation_augmented(self) -> npt.NDArray[np.uint8]:
        """As `augmented`."""

    @property
    def validation_masks(self) -> npt.NDArray[Any]:
        """As `masks`."""


class Batch(TypedDict):
    """Images as they lie in the synthetic set: uint8 (B, H, W, 3), and the mask, bool or {0, 1} (B, H, W)."""

    normal: Tensor
    augmented: Tensor
    mask: Tensor


@dataclass(frozen=True)
class SampleOrder:
    """Which samples a step sees, and how they are turned.

    Samples are drawn epoch by epoch, each epoch a new permutation; a batch may reach over the end of an epoch, so
    every batch is full, also where there are fewer samples than a batch holds.

    Attributes:
        count: samples in the synthetic set.
        batch_size: samples a step, over all processes; a multiple of `world`.
        seed: of permutations and turns.
        rank: which process this is, in [0, world).
        world: processes that share each batch.
        flips: mirror images at random.
        quarter_turns: turn images by quarters at random; has no effect where they are not square.
    """

    count: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    flips: bool = True
    rot90: bool = True

    def samples(self, step: int) -> Indices:
        """This process's samples at a step: int64, shape (batch_size / world,), values in [0, count)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.rank :: self.world]
        epochs, places = np.divmod(positions, self.count)
        drawn = np.empty_like(places)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            drawn[of_epoch] = _permutation(self.count, self.seed, int(epoch))[places[of_epoch]]
        return drawn

    def turns(self, step: int) -> Turns:
        """This process's turns at a step: uint8 in [0, 8), shape (batch_size / world,); see `turn`."""
        generator = np.random.default_rng(derive_seed(self.seed, "turns", step))
        drawn = generator.integers(0, 8, size=self.batch_size, dtype=np.uint8)[self.rank :: self.world]
        return drawn & np.uint8(_MIRRORS * self.flips | _SWAP * self.rot90)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Indices:
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(count)


def turn(images: Tensor, turns: Tensor) -> Tensor:
    """Mirror and turn each image of a batch in its own way.

    Args:
        images: any type, shape (B, H, W) or (B, H, W, 3).
        turns: uint8, shape (B,). Bit 0 mirrors left and right, bit 1 up and down; bit 2 then swaps rows and columns,
            which with the mirrors gives the quarter turns; it is ignored where the images are not square.

    Returns:
        Images of the same shape and type.
    """

    def where(bit: int, changed: Tensor, kept: Tensor) -> Tensor:
        chosen = (turns & (1 << bit) != 0).view(-1, *[1] * (kept.ndim - 1))
        return torch.where(chosen, changed, kept)

    images = where(0, images.flip(2), images)
    images = where(1, images.flip(1), images)
    if images.shape[1] == images.shape[2]:
        images = where(2, images.transpose(1, 2), images)
    return images


def to_images(images: Tensor, *, channels_last: bool) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [0, 1], on the images' device, in the memory format asked for."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = images.permute(0, 3, 1, 2).to(dtype=torch.float32, memory_format=memory_format)
    return images.div_(255)


class SyntheticBatches(Dataset[Batch]):
    """The batches of all steps, addressed by step, gathered from where the synthetic set lies.

    Args:
        synthetic set: the synthetic set, memory-mapped or in memory.
        order: which samples a step sees, and how normal image, augmented image and mask are turned.
        device: copy the synthetic set to this device once and gather there; None reads it from where it is.
    """

    def __init__(self, synthetic_set: TrainingSet, order: SampleOrder, *, device: torch.device | None) -> None:
        self._order = order
        self._device = device
        self._normal_index = np.asarray(synthetic_set.normal_index)
        arrays = {"normal": synthetic_set.normals, "augmented": synthetic_set.augmented, "mask": synthetic_set.masks}
        self._mapped = {} if device else arrays
        self._resident = {name: _copy(array, device) for name, array in arrays.items()} if device else {}

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, on the synthetic set's device."""
        samples = self._order.samples(step)
        rows = {"normal": self._normal_index[samples], "augmented": samples, "mask": samples}
        gathered = {name: self._gather(name, indices) for name, indices in rows.items()}
        drawn = self._order.turns(step)
        if drawn.any():
            turns = torch.from_numpy(drawn).to(self._device or "cpu")
            gathered = {name: turn(images, turns) for name, images in gathered.items()}
        return Batch(normal=gathered["normal"], augmented=gathered["augmented"], mask=gathered["mask"])

    def _gather(self, name: str, indices: Indices) -> Tensor:
        if self._device is None:
            return torch.from_numpy(np.ascontiguousarray(self._mapped[name][indices]))
        return self._resident[name].index_select(0, torch.from_numpy(indices).to(self._device))

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes that are spawned: memory maps travel as their file's name, not as their content."""
        return {**self.__dict__, "_mapped": {name: _describe(array) for name, array in self._mapped.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._mapped = {name: _reopen(described) for name, described in state["_mapped"].items()}


def _copy(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device in slices, so that a memory-mapped one never lies in main memory as a whole."""
    copied = torch.empty(array.shape, dtype=torch.from_numpy(array[:0].copy()).dtype, device=device)
    rows = max(1, 2**28 // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        copied[start : start + rows] = torch.from_numpy(np.array(array[start : start + rows]))
    return copied


def _describe(array: npt.NDArray[Any]) -> Any:  # noqa: ANN401 - a tuple for np.memmap, or the array itself
    whole = isinstance(array, np.memmap) and array.filename is not None
    return (array.filename, array.dtype, array.shape, array.offset) if whole else array  # type: ignore[attr-defined]


def _reopen(described: Any) -> npt.NDArray[Any]:  # noqa: ANN401 - what _describe returns
    if not isinstance(described, tuple):
        return described  # type: ignore[no-any-return]
    filename, dtype, shape, offset = described
    return np.memmap(filename, dtype=dtype, shape=shape, offset=offset, mode="r")


class StepLoader:
    """The batches of steps `first` .. `steps` - 1 in turn, prefetched by worker processes if asked for.

    It follows Lightning's protocol for loaders that resume (`state_dict`, `load_state_dict`), and its length counts the
    steps that were done before, as Lightning expects of such a loader.

    Args:
        batches: addressed by step.
        steps: length of the whole training.
        workers: processes that read ahead; 0 reads in this one.
        pin: put batches into page-locked memory, from which copies to a GPU overlap with computing.
    """

    def __init__(self, batches: SyntheticBatches, *, steps: int, workers: int, pin: bool) -> None:
        self._batches = batches
        self._steps = steps
        self._workers = workers
        self._pin = pin
        self._next = 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        ahead: DataLoader[Batch] = DataLoader(
            self._batches,
            batch_size=None,  # an item is a whole batch
            sampler=range(self._next, self._steps),
            num_workers=self._workers,
            pin_memory=self._pin,
            prefetch_factor=4 if self._workers else None,
        )
        for batch in ahead:
            self._next += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands, for the checkpoint."""
        return {"next_step": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where a checkpoint's loader stood."""
        self._next = state["next_step"]


def check_synthetic_set(synthetic_set: TrainingSet, *, image_size: tuple[int, int]) -> None:
    """Refuse a synthetic set that cannot be trained on, before any work.

    Raises:
        AlmrrError: the synthetic set is empty, its arrays do not belong together, or its images have another size.
    """
    count = len(synthetic_set.augmented)
    if count == 0 or len(synthetic_set.normals) == 0:
        raise AlmrrError("The synthetic set is empty; run the synthesize stage with samples > 0.")
    if not (len(synthetic_set.masks) == len(synthetic_set.normal_index) == count):
        raise AlmrrError(
            f"The synthetic set is inconsistent: {count} augmented images, {len(synthetic_set.masks)} masks and {len(synthetic_set.normal_index)} "
            "sources; run the synthesize stage again."
        )
    if synthetic_set.normal_index.min() < 0 or synthetic_set.normal_index.max() >= len(synthetic_set.normals):
        raise AlmrrError(
            f"The synthetic set is inconsistent: sources {synthetic_set.normal_index.min()} to {synthetic_set.normal_index.max()} for {len(synthetic_set.normals)} "
            "normal images; run the synthesize stage again."
        )
    sizes = {tuple(array.shape[1:3]) for array in (synthetic_set.normals, synthetic_set.augmented, synthetic_set.masks)}
    if sizes != {tuple(image_size)}:
        raise AlmrrError(
            f"The synthetic set's images have the size {' and '.join(map(str, sorted(sizes)))}, the model's input is "
            f"{tuple(image_size)}; run the synthesize stage with the same data.image_size."
        )


def choose_residence(synthetic_set: TrainingSet, device: torch.device) -> torch.device | None:
    """The device to keep the synthetic set on: a GPU with room for it, else None (read from the memory map)."""
    if device.type != "cuda":
        return None
    size = sum(array.nbytes for array in (synthetic_set.normals, synthetic_set.augmented, synthetic_set.masks))
    free, _ = torch.cuda.mem_get_info(device)
    resident = size <= RESIDENT_SHARE * free
    logger.info(
        "The synthetic set takes %.2f GB, the GPU has %.2f GB free: %s.",
        size / 1e9,
        free / 1e9,
        "kept on the GPU" if resident else "read from disk ahead of use",
    )
    return device if resident else None


def choose_workers(workers: int, *, device: torch.device, resident: bool) -> int:
    """Loader processes: none for a synthetic set on the device; the number asked for; or, where 0 leaves it open, four per GPU.

    On a CPU gathering a batch from the memory map costs a thousandth of a step, so 0 means none there.
    """
    if resident:
        return 0
    if workers == 0 and device.type == "cuda":
        return min(LOADER_PROCESSES, os.cpu_count() or 1)
    return workers


def sample_normals(synthetic_set: TrainingSet, limit: int) -> Iterator[Tensor]:
    """Normal images for statistics: up to `limit`, evenly spread, in batches of at most 8: float32 (b, 3, H, W)."""
    count = len(synthetic_set.normals)
    chosen = np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(np.int64))
    for start in range(0, len(chosen), 8):
        images = np.ascontiguousarray(synthetic_set.normals[chosen[start : start + 8]])
        yield to_images(torch.from_numpy(images), channels_last=False)


def build_loader(
    device: torch.device,
    rank: int,
    world: int,
    *,
    synthetic_set: TrainingSet,
    batch_size: int,
    steps: int,
    seed: int,
    flips: bool,
    rot90: bool,
    workers: int,
) -> StepLoader:
    """The loader of one process: from the device where the synthetic set fits on it, else from the memory map.

    Args:
        device: that the process trains on.
        rank: of the process.
        world: processes.
        synthetic set: of simulated anomalies.
        batch_size: samples a step, over all processes.
        steps: length of the training.
        seed: of order and turns.
        flips: mirror at random.
        quarter_turns: turn by quarters at random.
        workers: see `choose_workers`.
    """
    residence = choose_residence(synthetic_set, device)
    order = SampleOrder(
        len(synthetic_set.augmented),
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world=world,
        flips=flips,
        rot90=rot90,
    )
    return StepLoader(
        SyntheticBatches(synthetic_set, order, device=residence),
        steps=steps,
        workers=choose_workers(workers, device=device, resident=residence is not None),
        pin=device.type == "cuda" and residence is None,
    )
