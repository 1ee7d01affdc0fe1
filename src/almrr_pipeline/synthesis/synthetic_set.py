"""The synthetic set: arrays of one size that are memory-mapped, and a json that says what they are.

normals.npy         uint8 (n, H, W, 3)   normal training images at the network's size, RGB
augmented.npy       uint8 (N, H, W, 3)   each a normal image with or without a simulated anomaly
masks.npy           uint8 (N, H, W)      1 where the anomaly is, else 0
source.npy          int64 (N,)           which normal image it was made of
held_normals.npy, held_augmented.npy, held_masks.npy, held_source.npy
                    the same, made of the validation images with random numbers of their own
synthetic_set.json           counts, shapes, checksums, seed, parameters, and the images it was made of
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from almrr_pipeline.config import Tiling
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.synthesis.subsets import Part, write_part, write_textures
from almrr_pipeline.synthesis.simulate import AnomalyRecipe, Material, Shape, Stream
from almrr_pipeline.synthesis.workers import count_processes, spread_over

logger = logging.getLogger(__name__)

DESCRIPTION = "synthetic_set.json"
CROPS_PER_IMAGE = 64
"""Random crops of a normal image when training on tiles; many more only repeat what they show."""
VALIDATION_SAMPLES = (16, 256)
"""Least and most samples of the held-out part: enough to tell two checkpoints apart, and quick to predict."""
LEAST_WORK = 256
"""Samples and images for which starting a process pays: about a second's work."""
_FOLDER_OVERHEAD = 1 << 20


@dataclass(frozen=True)
class SyntheticSet:
    """Simulated anomalies to train on; the arrays stay on disk until they are read.

    normals, augmented: uint8 in [0, 255], RGB, shapes (n, H, W, 3) and (N, H, W, 3). masks: uint8, 0 or 1, (N, H, W).
    source: int64 (N,), index into normals. held_*: the same for images that are not trained on; may be empty.
    description: what synthetic_set.json says.
    """

    normals: npt.NDArray[np.uint8]
    augmented: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.uint8]
    source: npt.NDArray[np.int64]
    validation_normals: npt.NDArray[np.uint8]
    validation_augmented: npt.NDArray[np.uint8]
    validation_masks: npt.NDArray[np.uint8]
    validation_normal_index: npt.NDArray[np.int64]
    description: dict[str, Any]

    def __len__(self) -> int:
        """Number of samples to train on."""
        return len(self.augmented)

    @staticmethod
    def load(folder: Path) -> SyntheticSet:
        """Open a synthetic set that `PlannedSyntheticSet.save` has written, without reading it.

        Raises:
            AlmrrError: a file is missing, or is not what synthetic_set.json says.
        """
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            arrays = {name: _open_array(folder, name, said) for name, said in description["arrays"].items()}
            return SyntheticSet(**arrays, description=description)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AlmrrError(
                f"{folder} holds no complete synthetic set ({error}); run `dvc repro synthesize` again."
            ) from error


@dataclass(frozen=True)
class PlannedSyntheticSet:
    """A synthetic set that has been checked as far as its parameters go, and that is made when it is saved."""

    parts: tuple[Part, ...]
    texture_paths: tuple[Path, ...]
    root: Path
    image_size: tuple[int, int]
    tile_scale: float | None
    """Factor of the images before crops are cut; None takes whole images, resized."""
    recipe: AnomalyRecipe
    workers: int

    def save(self, folder: Path) -> None:
        """Simulate the samples and write them; the same to the last bit whatever the number of processes.

        Args:
            folder: exists and is empty. It holds a synthetic set only if this returns.

        Raises:
            AlmrrError: an image cannot be read, the disk has not enough space, or the threshold leaves no mask.
        """
        self._check_space(folder)
        samples = sum(part.samples for part in self.parts)
        images = len(self.texture_paths) + sum(len(part.images) for part in self.parts)
        processes = count_processes(self.workers, work=samples + images, least_work=LEAST_WORK)
        begun = time.perf_counter()
        with spread_over(processes) as spread, tempfile.TemporaryDirectory(prefix="textures.", dir=folder) as scratch:
            textures = Path(scratch) / "textures.npy"
            write_textures(self.texture_paths, textures, image_size=self.image_size, spread=spread)
            for part in self.parts:
                write_part(
                    part,
                    folder,
                    textures=textures,
                    image_size=self.image_size,
                    tile_scale=self.tile_scale,
                    recipe=self.recipe,
                    spread=spread,
                )
        seconds = time.perf_counter() - begun
        self._describe(folder)
        logger.info(
            "%d samples in %.1f s, %.0f a second (processes: %d)", samples, seconds, samples / seconds, processes
        )

    def _check_space(self, folder: Path) -> None:
        """A memory map on a full disk would end the process without a word, so the space is looked at before."""
        pixels = math.prod(self.image_size)
        needed = 3 * pixels * len(self.texture_paths) + _FOLDER_OVERHEAD
        needed += sum(3 * pixels * part.normals + (4 * pixels + 8) * part.samples for part in self.parts)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise AlmrrError(
                f"The synthetic set needs {needed / 2**30:.2f} GiB, {folder} has {free / 2**30:.2f} GiB "
                "free; free some space or lower synthesis.samples."
            )

    def _describe(self, folder: Path) -> None:
        """Write synthetic_set.json last: nothing in it depends on when, where or in how many processes the synthetic set was made."""
        shapes = {name: said for part in self.parts for name, said in part.array_shapes(self.image_size).items()}
        training, validation = self.parts
        masks = open_memmap(folder / "masks.npy", mode="r")
        description = {
            "samples": training.samples,
            "anomalous": sum(int(mask.any()) for mask in masks),
            "validation_samples": validation.samples,
            "textures": len(self.texture_paths),
            "image_size": list(self.image_size),
            "tile_scale": self.tile_scale,
            **asdict(self.recipe),
            "arrays": {
                name: {
                    "shape": shape,
                    "dtype": np.dtype(dtype).name,
                    "sha256": _digest(folder / f"{name}.npy"),  # by which a training knows the synthetic set it may go on with
                }
                for name, (shape, dtype) in shapes.items()
            },
            "training_images": [_relative(path, self.root) for path in training.images],
            "validation_images": [_relative(path, self.root) for path in validation.images],
        }
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (folder / DESCRIPTION).write_text(text, encoding="utf-8")


def synthesize(
    image_paths: Sequence[Path],
    validation_paths: Sequence[Path],
    texture_paths: Sequence[Path],
    *,
    root: Path,
    image_size: tuple[int, int],
    samples: int,
    seed: int,
    tiling: Tiling | None = None,
    anomaly_free: float = 0.5,
    grid_exponents: tuple[int, int] = (0, 5),
    threshold: float = 0.5,
    opacity: tuple[float, float] = (0.0, 0.8),
    operations: int = 3,
    color: Literal["keep", "match"] = "keep",
    materials: Mapping[Material, float] = MappingProxyType({"texture": 1.0}),
    shapes: Mapping[Shape, float] = MappingProxyType({"perlin": 1.0}),
    workers: int = 0,
    crops_per_image: int = CROPS_PER_IMAGE,
) -> PlannedSyntheticSet:
    """Describe a synthetic set (stage 1 of ALMRR); it is made when it is saved.

    No image but those handed in is ever opened. Sample k depends on the seed, k, the images and the parameters
    below; not on the number of processes, nor, except for the number of crops in tiling, on the number of samples.

    Args:
        image_paths: normal images to train on.
        held_out_paths: normal images held out of the training, for the part that serves selection; may be empty.
        texture_paths: textures.
        root: folder that synthetic_set.json names the images relative to.
        image_size: rows and columns of the network's input.
        samples: simulated images to train on.
        seed: of all random numbers; 0 or more.
        tiling: if enabled, normal images are random crops of the scaled images instead of resized whole ones.
        anomaly_free: probability that a sample stays as it is, with an empty mask.
        grid_exponents: the Perlin grid has 2^k cells per axis, k drawn per axis from this range, ends included.
        threshold: Perlin noise above it is anomalous; in (0, 1).
        opacity: range of b, the share of the normal image that shines through an anomaly; in [0, 1].
        operations: how many of the ten operations change a texture.
        color: keep is the paper's way; match takes a texture's color away where the normal image has none,
            so that color, which no defect in such images has, does not give the anomaly away.
        materials: what an anomaly is made of, by shares: an altered `texture`, or the image itself under another
            `exposure`.
        shapes: its outline, by shares: `perlin` noise, a thin `line`, or a `band` from edge to edge.
        workers: processes; 0 takes one per core, 1 works in this process.
        crops_per_image: most crops of one image, in tiling.

    Returns:
        What `save(folder)` writes.

    Raises:
        AlmrrError: there is no image to train on or no texture, an image is both trained on and held out, or
            a range ends before it begins.
    """
    _check_images(image_paths, validation_paths, texture_paths)
    for name, (low, high) in {"grid_exponents": grid_exponents, "opacity": opacity}.items():
        if low > high:
            raise AlmrrError(f"synthesis.{name}: {low} to {high} is no range; put the smaller number first.")
    tile_scale = tiling.scale if tiling is not None and tiling.enabled else None

    def count_normals(images: int, count: int) -> int:
        return images if tile_scale is None else max(images, min(count, crops_per_image * images))

    least, most = VALIDATION_SAMPLES
    validation_samples = min(most, max(least, samples // 10)) if validation_paths else 0
    trained, validation = len(image_paths), len(validation_paths)
    return PlannedSyntheticSet(
        parts=(
            Part(
                "", tuple(image_paths), count_normals(trained, samples), samples, Stream.TRAINING, Stream.TRAINING_CROPS
            ),
            Part(
                "validation_",
                tuple(validation_paths),
                count_normals(validation, validation_samples),
                validation_samples,
                Stream.VALIDATION,
                Stream.VALIDATION_CROPS,
            ),
        ),
        texture_paths=tuple(texture_paths),
        root=root,
        image_size=image_size,
        tile_scale=tile_scale,
        recipe=AnomalyRecipe(
            anomaly_free,
            grid_exponents,
            threshold,
            opacity,
            operations,
            seed,
            match_color=color == "match",
            materials=dict(materials),
            shapes=dict(shapes),
        ),
        workers=workers,
    )


def _check_images(images: Sequence[Path], validation: Sequence[Path], textures: Sequence[Path]) -> None:
    if not images:
        raise AlmrrError("There is no normal image to simulate anomalies on; look at the category's manifest.csv.")
    if not textures:
        raise AlmrrError("There is no image that could serve as texture; run `dvc repro shared`.")
    if both := sorted(set(images) & set(validation)):
        raise AlmrrError(f"{both[0]} is to be trained on and held out at once; name it in one list only.")


def _open_array(folder: Path, name: str, said: dict[str, Any]) -> npt.NDArray[Any]:
    array = open_memmap(folder / f"{name}.npy", mode="r")
    if list(array.shape) != said["shape"] or array.dtype != said["dtype"]:
        raise ValueError(f"{name}.npy is {array.dtype} {array.shape}, expected {said['dtype']} {said['shape']}")
    return array


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
