"""The synthetic set: memory-mapped arrays of one image size, and a JSON file that describes them.

normals.npy         uint8 (n, H, W, 3)   normal training images at the network's size, RGB
augmented.npy       uint8 (N, H, W, 3)   each a normal image with or without a simulated anomaly
masks.npy           uint8 (N, H, W)      1 where the anomaly is, else 0
normal_index.npy    int64 (N,)           row of the normal image that was augmented
validation_*.npy                         the same four, made of the validation images
synthetic_set.json                       settings, shapes, checksums, names of the images

With a region of interest, which its description then has, the images are blank outside of it, and
no anomaly is there.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from almrr_pipeline.common.arrays import ImageArray, Indices
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import hash_file
from almrr_pipeline.config import SynthesisSettings, Tiling
from almrr_pipeline.synthesis.writer import ImagePaths, SetWriter, count_processes, spread_over

logger = logging.getLogger(__name__)

DESCRIPTION = "synthetic_set.json"
CROPS_PER_IMAGE = 64  # at most, when training on tiles; many more only repeat an image's content
VALIDATION_SAMPLES = (16, 256)  # enough to tell two checkpoints apart, few enough to predict often
LEAST_WORK = 256  # samples and images, about a second's work, for which starting a process pays
_FOLDER_OVERHEAD = 1 << 20  # bytes, for the description and the arrays' headers
ArraySpec = tuple[tuple[int, ...], str]  # shape and dtype


@dataclass(frozen=True)
class SyntheticSet:
    """Simulated anomalies: arrays, on disk until they are read, as described in this file's head.

    Those of the validation samples may be empty. description: content of synthetic_set.json.
    """

    normals: ImageArray
    augmented: ImageArray
    masks: npt.NDArray[np.uint8]
    normal_index: Indices
    validation_normals: ImageArray
    validation_augmented: ImageArray
    validation_masks: npt.NDArray[np.uint8]
    validation_normal_index: Indices
    description: dict[str, Any]

    def __len__(self) -> int:
        """Number of training samples."""
        return len(self.augmented)

    @property
    def has_region(self) -> bool:
        """Whether what is blank in the images does not count."""
        return "region" in self.description

    @staticmethod
    def load(folder: Path) -> SyntheticSet:
        """Open the synthetic set that `synthesize` has written to a folder; arrays stay on disk.

        Raises:
            AlmrrError: a file is missing, or differs from its description or checksum.
        """
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            arrays = {
                name: _open_array(folder / f"{name}.npy", expected)
                for name, expected in description["arrays"].items()
            }
            return SyntheticSet(**arrays, description=description)
        except (OSError, ValueError, KeyError, TypeError) as error:
            advice = "run `dvc repro synthesize`"
            raise AlmrrError(
                f"{folder} has no complete synthetic set ({error}); {advice}."
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
        tiling: if enabled, normal images are random crops of the scaled images, not whole ones.
        seed: of all random numbers; 0 or more.

    Raises:
        AlmrrError: there is no training image or no texture, an image is in both splits or cannot
            be read, the disk has too little space, or the noise threshold leaves no mask.
    """
    _check_images(images, image_size)
    crop_scale = tiling.scale if tiling.enabled else None
    writer = SetWriter(folder, settings, seed, crop_scale, images.reading, images.region)
    arrays = _plan_arrays(images, settings.samples, size=image_size, crops=tiling.enabled)
    _check_space(folder, arrays)
    for name, (shape, dtype) in arrays.items():
        open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
    samples = sum(arrays[name][0][0] for name in ("masks", "validation_masks"))
    work = samples + len(images.textures) + len(images.training) + len(images.validation)
    processes = count_processes(settings.workers, work=work, least_work=LEAST_WORK)
    begun = time.perf_counter()
    with spread_over(processes) as spread:
        writer.write_all(images, spread)
    seconds = time.perf_counter() - begun
    del arrays["textures"]  # needed while the samples are made, no part of the set
    (folder / "textures.npy").unlink()
    text = json.dumps(_describe(writer, images, arrays), indent=2, ensure_ascii=False) + "\n"
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")
    logger.info("%d samples in %.1f s (processes: %d)", samples, seconds, processes)


def _plan_arrays(
    images: ImagePaths, samples: int, *, size: tuple[int, int], crops: bool
) -> dict[str, ArraySpec]:
    """Return shape and dtype of each array by its name, for so many training samples."""
    least, most = VALIDATION_SAMPLES
    validation_samples = min(most, max(least, samples // 10)) if images.validation else 0
    arrays: dict[str, ArraySpec] = {"textures": ((len(images.textures), *size, 3), "uint8")}
    for (prefix, paths), count in zip(images.splits(), (samples, validation_samples), strict=True):
        normals = len(paths)
        if crops:
            normals = max(normals, min(count, CROPS_PER_IMAGE * normals))
        arrays[f"{prefix}normals"] = ((normals, *size, 3), "uint8")
        arrays[f"{prefix}augmented"] = ((count, *size, 3), "uint8")
        arrays[f"{prefix}masks"] = ((count, *size), "uint8")
        arrays[f"{prefix}normal_index"] = ((count,), "int64")
    return arrays


def _check_images(images: ImagePaths, image_size: tuple[int, int]) -> None:
    if not images.training:
        raise AlmrrError(
            "There is no normal image to train on; look at the category's manifest.csv."
        )
    if not images.textures:
        raise AlmrrError("There is no image to serve as a texture; run `dvc repro shared`.")
    if both := sorted({*images.training} & {*images.validation}):
        raise AlmrrError(f"{both[0]} is both a training and a validation image; list it once only.")
    if images.region is not None and not images.region.at(image_size).any():
        raise AlmrrError(
            f"data.region: nothing of it is left at the network's {image_size[1]} x "
            f"{image_size[0]} pixels; enlarge it, or data.image_size."
        )


def _check_space(folder: Path, arrays: dict[str, ArraySpec]) -> None:
    """Compare the free space with the arrays' size: a memory map on a full disk is a crash."""
    sizes = (math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())
    needed, free = sum(sizes) + _FOLDER_OVERHEAD, shutil.disk_usage(folder).free
    if needed > free:
        raise AlmrrError(
            f"The synthetic set needs {needed / 2**30:.2f} GiB, {folder} has {free / 2**30:.2f} "
            "GiB free; free some space or lower synthesis.samples."
        )


def _describe(
    writer: SetWriter, images: ImagePaths, arrays: dict[str, ArraySpec]
) -> dict[str, Any]:
    """Describe a set, independent of when, where and in how many processes it was made.

    A training recognizes the set that it may resume on by the checksums.
    """
    training, validation = (
        [path.relative_to(images.root).as_posix() for path in paths] for _, paths in images.splits()
    )
    hashes = {name: hash_file(writer.folder / f"{name}.npy") for name in arrays}
    return {
        **writer.settings.model_dump(mode="json", exclude={"workers"}),
        "seed": writer.seed,
        "crop_scale": writer.crop_scale,
        "anomalous": sum(int(mask.any()) for mask in writer.open("masks")),
        "textures": len(images.textures),
        **({"region": images.region.fraction} if images.region else {}),
        "arrays": {
            name: {"shape": shape, "dtype": dtype, "sha256": hashes[name]}
            for name, (shape, dtype) in arrays.items()
        },
        "training_images": training,
        "validation_images": validation,
    }


def _open_array(file: Path, expected: dict[str, Any]) -> npt.NDArray[Any]:
    array = open_memmap(file, mode="r")
    found, wanted = (list(array.shape), array.dtype.name), (expected["shape"], expected["dtype"])
    if found != wanted:
        raise ValueError(f"{file.name} has shape and dtype {found}, expected {wanted}")
    if hash_file(file) != expected["sha256"]:
        raise ValueError(f"{file.name} is not the file that was written: its checksum differs")
    return array
