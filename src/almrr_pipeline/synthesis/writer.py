"""The arrays of a synthetic set, written stretch by stretch in any number of processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import Reading, read_image
from almrr_pipeline.common.progress import track
from almrr_pipeline.common.region import Region, find_counted, resize_counted
from almrr_pipeline.config import SynthesisSettings
from almrr_pipeline.synthesis.simulate import Stream, make_generator, simulate_sample

Spread = Callable[..., Iterator[int]]
"""Like the built-in `map`: calls a function on each task, yields the results in their order."""
# Of the training and the validation samples, by the prefix of their arrays' names.
SAMPLE_STREAMS = {"": Stream.TRAINING, "validation_": Stream.VALIDATION}
CROP_STREAMS = {"": Stream.TRAINING_CROPS, "validation_": Stream.VALIDATION_CROPS}
# Tenths of a second's work: long beside the cost of a task, short enough for smooth progress.
_SAMPLES_PER_TASK, _IMAGES_PER_TASK = 32, 16


@dataclass(frozen=True)
class ImagePaths:
    """The images that a synthetic set is made of; no others are opened."""

    root: Path  # folder that the set's description names the normal images relative to
    training: Sequence[Path]  # normal images to train on
    validation: Sequence[Path]  # normal images that are not trained on; may be empty
    textures: Sequence[Path]
    reading: Reading | None = None  # of the normal images' values
    region: Region | None = None  # outside of which they are blank

    def splits(self) -> tuple[tuple[str, Sequence[Path]], tuple[str, Sequence[Path]]]:
        """The normal images of both splits, each after the prefix of its arrays' names."""
        return ("", self.training), ("validation_", self.validation)


@dataclass(frozen=True)
class SetWriter:
    """Fills a set's arrays, which exist; the result depends on arguments and files alone.

    Every sample and every crop has a random generator of its own, so any process may write it.
    """

    folder: Path
    settings: SynthesisSettings
    seed: int
    crop_scale: float | None  # of the images before crops are cut; None for whole images, resized
    reading: Reading | None = None  # of the images' values
    region: Region | None = None  # outside of which normal images are blank

    def open(self, name: str, mode: str = "r") -> npt.NDArray[Any]:
        """Open an array by its name."""
        return open_memmap(self.folder / f"{name}.npy", mode=mode)

    def write_all(self, images: ImagePaths, spread: Spread) -> None:
        """Write the textures, then the training and the validation samples."""
        self._resize("textures", images.textures, spread, "read textures")
        for prefix, paths in images.splits():
            normals = f"{prefix}normals"
            if self.crop_scale is None:
                self._resize(normals, paths, spread, "read normal images")
            else:
                total = len(self.open(normals))
                rows = [range(first, total, len(paths)) for first in range(len(paths))]
                crops = spread(partial(self.write_crops, prefix), paths, rows)
                _follow(crops, total, "crops", "cut normal images")
            total = len(self.open(f"{prefix}augmented"))
            samples = spread(partial(self.write_samples, prefix), _cut(total, _SAMPLES_PER_TASK))
            _follow(samples, total, "samples", "simulate anomalies")

    def write_resized(self, name: str, paths: Sequence[Path], rows: range) -> int:
        """Read images and write them at the network's size; returns how many."""
        target = self.open(name, "r+")
        for row, path in zip(rows, paths, strict=True):
            region = None if name == "textures" else self.region
            target[row] = resize_counted(read_image(path, self.reading), target.shape[1:3], region)
        return len(rows)

    def write_crops(self, prefix: str, path: Path, rows: range) -> int:
        """Read an image, scale it and write random crops of it; returns how many."""
        target = self.open(f"{prefix}normals", "r+")
        height, width = target.shape[1:3]
        image = read_image(path, self.reading)
        scale = self.crop_scale or 1.0
        image = scale_image(image, scale, at_least=(height, width), region=self.region)
        counted = None if self.region is None else np.flatnonzero(find_counted(image))
        for row in rows:
            generator = make_generator(self.seed, row, CROP_STREAMS[prefix])
            if counted is None or not counted.size:
                top = int(generator.integers(image.shape[0] - height + 1))
                left = int(generator.integers(image.shape[1] - width + 1))
            else:  # somewhere around a pixel that counts
                place = divmod(int(generator.choice(counted)), image.shape[1])
                place = np.array(place) - generator.integers((height, width))
                top, left = place.clip(0, np.subtract(image.shape[:2], (height, width)))
            target[row] = image[top : top + height, left : left + width]
        return len(rows)

    def write_samples(self, prefix: str, rows: range) -> int:
        """Simulate samples and write them; returns how many."""
        names = ("augmented", "masks", "normal_index")
        targets = [self.open(f"{prefix}{name}", "r+") for name in names]
        normals, textures = self.open(f"{prefix}normals"), self.open("textures")
        for row in rows:
            sample = simulate_sample(
                row,
                normals=normals,
                textures=textures,
                settings=self.settings,
                seed=self.seed,
                stream=SAMPLE_STREAMS[prefix],
                has_region=self.region is not None,
            )
            for target, value in zip(targets, sample, strict=True):
                target[row] = value
        return len(rows)

    def _resize(self, name: str, paths: Sequence[Path], spread: Spread, description: str) -> None:
        rows = _cut(len(paths), _IMAGES_PER_TASK)
        chunks = [paths[one.start : one.stop] for one in rows]
        done = spread(partial(self.write_resized, name), chunks, rows)
        _follow(done, len(paths), "images", description)


def scale_image(
    image: ImageArray, scale: float, *, at_least: tuple[int, int], region: Region | None = None
) -> ImageArray:
    """Scale both sides of an image; pad one smaller than a crop by reflection, as prediction does.

    uint8 in [0, 255], shape (H, W, 3), in and out; at_least: rows and columns of a crop; what is
    outside of the region is blank.
    """
    rows, columns = (max(1, round(length * scale)) for length in image.shape[:2])
    scaled = resize_counted(image, (rows, columns), region)
    missing = (max(0, at_least[0] - rows), max(0, at_least[1] - columns))
    if not any(missing):
        return scaled
    padding = [(pixels // 2, pixels - pixels // 2) for pixels in missing]
    return np.pad(scaled, [*padding, (0, 0)], mode="reflect")


def count_processes(requested: int, *, work: int, least_work: int) -> int:
    """Return how many processes to start: as requested (0: one per core that may be used).

    Where OMP_NUM_THREADS leaves other cores to other processes, 0 leaves them too. There are fewer
    where less than `least_work` pieces of work remain for each.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    with suppress(KeyError, ValueError):
        cores = min(cores, int(os.environ["OMP_NUM_THREADS"]))
    return max(1, min(requested or cores, work // least_work))


@contextmanager
def spread_over(processes: int) -> Iterator[Spread]:
    """Provide a `map` that works in so many processes, with 1 in this one.

    Processes are spawned: a fork copies the locks of libraries whose threads it does not copy. So
    functions and tasks have to be importable and picklable. An error in a task is raised here.

    Raises:
        AlmrrError: a process ended without an answer.
    """
    if processes == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, mp_context=spawn) as executor:
            yield executor.map
    except BrokenProcessPool as error:
        raise AlmrrError(
            f"One of {processes} processes ended without an answer, perhaps for lack of memory; "
            "set synthesis.workers to a smaller number (1 starts no further processes)."
        ) from error


def _follow(done: Iterable[int], total: int, unit: str, description: str) -> None:
    """Run through the results of a `Spread`, showing progress."""
    with track(total, unit=unit, description=description) as advance:
        for amount in done:
            advance(amount)


def _cut(total: int, step: int) -> list[range]:
    return [range(start, min(total, start + step)) for start in range(0, total, step)]
