"""The synthetic set: memory-mapped arrays of one image size, and a JSON file that describes them.

normals.npy         uint8 (n, H, W, 3)   normal training images at the network's size, RGB
augmented.npy       uint8 (N, H, W, 3)   each a normal image with or without a simulated anomaly
masks.npy           uint8 (N, H, W)      1 where the anomaly is, else 0
normal_index.npy    int64 (N,)           row of the normal image that was augmented
validation_*.npy                         the same four, made of the validation images
synthetic_set.json                       counts, shapes, checksums, settings, names of the images
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import hash_file
from almrr_pipeline.config import SynthesisSettings, Tiling
from almrr_pipeline.synthesis.workers import count_processes, spread_over
from almrr_pipeline.synthesis.writer import SPLITS, TEXTURES, ImagePaths, SetWriter

__all__ = ["ImagePaths", "SyntheticSet", "synthesize"]

logger = logging.getLogger(__name__)

DESCRIPTION = "synthetic_set.json"
CROPS_PER_IMAGE = 64
"""Most random crops of a normal image when training on tiles; many more only repeat its content."""
VALIDATION_SAMPLES = (16, 256)
"""Least and most validation samples: enough to tell two checkpoints apart, quick to predict."""
LEAST_WORK = 256
"""Samples and images for which starting a process pays: about a second's work."""
_FOLDER_OVERHEAD = 1 << 20
"""Bytes for the description and the arrays' headers."""
ArraySpec = tuple[tuple[int, ...], str]
"""Shape and dtype."""


@dataclass(frozen=True)
class SyntheticSet:
    """Simulated anomalies to train on; the arrays stay on disk until they are read.

    normals, augmented: uint8 in [0, 255], RGB, shapes (n, H, W, 3) and (N, H, W, 3).
    masks: uint8, 0 or 1, shape (N, H, W). normal_index: int64 (N,), row in normals.
    validation_*: the same of images that are not trained on; may be empty.
    description: content of synthetic_set.json.
    """

    normals: npt.NDArray[np.uint8]
    augmented: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.uint8]
    normal_index: npt.NDArray[np.int64]
    validation_normals: npt.NDArray[np.uint8]
    validation_augmented: npt.NDArray[np.uint8]
    validation_masks: npt.NDArray[np.uint8]
    validation_normal_index: npt.NDArray[np.int64]
    description: dict[str, Any]

    def __len__(self) -> int:
        """Number of training samples."""
        return len(self.augmented)

    @staticmethod
    def load(folder: Path) -> SyntheticSet:
        """Open the synthetic set that `synthesize` has written to a folder, without reading it.

        Raises:
            AlmrrError: a file is missing, or differs from its description.
        """
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            arrays = {
                name: _open_array(folder / f"{name}.npy", expected)
                for name, expected in description["arrays"].items()
            }
            return SyntheticSet(**arrays, description=description)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AlmrrError(
                f"{folder} holds no complete synthetic set ({error}); "
                "run `dvc repro synthesize` again."
            ) from error


def synthesize(
    images: ImagePaths,
    settings: SynthesisSettings,
    *,
    folder: Path,
    image_size: tuple[int, int],
    tiling: Tiling,
    seed: int,
) -> None:
    """Simulate a synthetic set and write it to a folder (stage 1 of ALMRR).

    Sample k depends on the seed, k, the images and the settings; not on the number of processes
    nor, except for the number of crops with tiling, on the number of samples.

    Args:
        images: paths of the normal images and the textures.
        settings: number of samples, and how they are simulated.
        folder: exists and is empty. It holds a synthetic set only if this function returns.
        image_size: rows and columns of the network's input.
        tiling: if enabled, normal images are random crops of the scaled images, else the whole
            images, resized.
        seed: of all random numbers; 0 or more.

    Raises:
        AlmrrError: there is no training image or no texture, an image is in both splits or cannot
            be read, the disk has too little space, or the noise threshold leaves no mask.
    """
    _check_images(images)
    writer = SetWriter(folder, settings, seed, tiling.scale if tiling.enabled else None)
    arrays = plan_arrays(images, settings.samples, size=image_size, crops=tiling.enabled)
    _check_space(folder, arrays.values())
    for name, (shape, dtype) in arrays.items():
        open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
    samples = sum(shape[0] for name, (shape, _) in arrays.items() if name.endswith("masks"))
    work = samples + len(images.textures) + len(images.training) + len(images.validation)
    processes = count_processes(settings.workers, work=work, least_work=LEAST_WORK)
    begun = time.perf_counter()
    with spread_over(processes) as spread:
        writer.write_all(images, spread)
    seconds = time.perf_counter() - begun
    (folder / f"{TEXTURES}.npy").unlink()
    del arrays[TEXTURES]
    description = _describe(writer, images, arrays)
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")
    logger.info("%d samples in %.1f s (processes: %d)", samples, seconds, processes)


def plan_arrays(
    images: ImagePaths, samples: int, *, size: tuple[int, int], crops: bool
) -> dict[str, ArraySpec]:
    """Return shape and dtype of each array by its name, for so many training samples."""
    least, most = VALIDATION_SAMPLES
    validation_samples = min(most, max(least, samples // 10)) if images.validation else 0
    arrays: dict[str, ArraySpec] = {}
    for split, paths, count in zip(
        SPLITS, (images.training, images.validation), (samples, validation_samples), strict=True
    ):
        normals = len(paths)
        if crops:
            normals = max(normals, min(count, CROPS_PER_IMAGE * normals))
        arrays[f"{split.prefix}normals"] = ((normals, *size, 3), "uint8")
        arrays[f"{split.prefix}augmented"] = ((count, *size, 3), "uint8")
        arrays[f"{split.prefix}masks"] = ((count, *size), "uint8")
        arrays[f"{split.prefix}normal_index"] = ((count,), "int64")
    arrays[TEXTURES] = ((len(images.textures), *size, 3), "uint8")
    return arrays


def _check_images(images: ImagePaths) -> None:
    if not images.training:
        raise AlmrrError(
            "There is no normal image to simulate anomalies on; look at the category's "
            "manifest.csv."
        )
    if not images.textures:
        raise AlmrrError("There is no image to serve as a texture; run `dvc repro shared`.")
    if both := sorted({*images.training} & {*images.validation}):
        raise AlmrrError(
            f"{both[0]} is both a training and a validation image; name it in one list only."
        )


def _check_space(folder: Path, arrays: Iterable[ArraySpec]) -> None:
    """Compare the free space with the arrays' size: a memory map on a full disk is a crash."""
    needed = _FOLDER_OVERHEAD
    needed += sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise AlmrrError(
            f"The synthetic set needs {needed / 2**30:.2f} GiB, {folder} has {free / 2**30:.2f} "
            "GiB free; free some space or lower synthesis.samples."
        )


def _describe(
    writer: SetWriter, images: ImagePaths, arrays: dict[str, ArraySpec]
) -> dict[str, Any]:
    """Describe a set; nothing depends on when, where or in how many processes it was made."""
    return {
        **writer.settings.model_dump(mode="json", exclude={"workers"}),
        "seed": writer.seed,
        "crop_scale": writer.crop_scale,
        "anomalous": sum(int(mask.any()) for mask in writer.open("masks")),
        "textures": len(images.textures),
        # A training recognizes the set that it may resume on by the checksums.
        "arrays": {
            name: {
                "shape": shape,
                "dtype": dtype,
                "sha256": hash_file(writer.folder / f"{name}.npy"),
            }
            for name, (shape, dtype) in arrays.items()
        },
        "training_images": [_relative(path, images.root) for path in images.training],
        "validation_images": [_relative(path, images.root) for path in images.validation],
    }


def _open_array(file: Path, expected: dict[str, Any]) -> npt.NDArray[Any]:
    array = open_memmap(file, mode="r")
    if list(array.shape) != expected["shape"] or array.dtype != expected["dtype"]:
        raise ValueError(
            f"{file.name} is {array.dtype} {array.shape}, "
            f"expected {expected['dtype']} {expected['shape']}"
        )
    return array


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
