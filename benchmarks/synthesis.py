"""Simulated anomalies per second by number of processes, from images to a synthetic set.

    python benchmarks/synthesis.py [--samples 2000] [--size 256] [--workers 1 2] [--repeats 3]
    [--json FILE]

Normal images and textures are those of the sample suite. The time includes starting the processes,
decoding and resizing all images, and writing the synthetic set. Rates are medians of the repeats
with their least and greatest. The processor time per sample, of all processes together, is the
figure to compare on a machine that is busy otherwise. The second table says what one anomaly
costs, step by step, in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from almrr_pipeline.common.arrays import MaskArray
from almrr_pipeline.common.images import read_image, resize_image
from almrr_pipeline.config import SynthesisSettings, Tiling
from almrr_pipeline.synthesis.masks import perlin_mask, perlin_noise
from almrr_pipeline.synthesis.simulate import blend_anomaly
from almrr_pipeline.synthesis.synthetic_set import ImagePaths, synthesize
from almrr_pipeline.synthesis.textures import OPERATIONS, alter_texture

CATEGORY = "sample_gravel"


class Cost(NamedTuple):
    """What a synthetic set costs."""

    samples_per_second: float
    processor_ms_per_sample: float


def collect_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """Write the sample suite's images; returns normal images and textures."""
    # Imported here, because the processes that are started import this file, and these take a
    # second.
    from almrr_pipeline.datasets.base import FetchRequest
    from almrr_pipeline.datasets.registry import dataset_for
    from almrr_pipeline.datasets.textures import write_package_textures

    (folder / CATEGORY).mkdir()
    (folder / "textures").mkdir()
    source = dataset_for(CATEGORY)
    source.fetch(
        CATEGORY, target=folder / CATEGORY, request=FetchRequest(scratch=folder / "scratch")
    )
    write_package_textures(folder / "textures")
    normals = [
        item.image for item in source.items(CATEGORY, folder / CATEGORY) if item.split == "train"
    ]
    return normals, sorted((folder / "textures").iterdir())


def measure_synthetic_set(
    normals: list[Path], textures: list[Path], *, samples: int, size: int, workers: int
) -> Cost:
    """Simulate a synthetic set once."""
    with tempfile.TemporaryDirectory() as folder:
        begun, used = time.perf_counter(), _processor_seconds()
        synthesize(
            ImagePaths(normals[0].parent, training=normals, validation=[], textures=textures),
            SynthesisSettings(samples=samples, workers=workers),
            folder=Path(folder),
            image_size=(size, size),
            tiling=Tiling(),
            seed=0,
        )
        seconds = time.perf_counter() - begun
    return Cost(samples / seconds, 1e3 * (_processor_seconds() - used) / samples)


def measure_steps(normals: list[Path], textures: list[Path], *, size: int) -> dict[str, float]:
    """Time the steps of one simulated anomaly; returns milliseconds, medians of 100 draws."""
    normal, texture = (
        resize_image(read_image(paths[0]), (size, size)) for paths in (normals, textures)
    )
    generator = np.random.default_rng(0)
    settings = SynthesisSettings()

    def draw_mask() -> MaskArray:
        return perlin_mask(
            (size, size),
            grid_exponents=settings.grid_exponents,
            threshold=settings.threshold,
            generator=generator,
        )

    mask = draw_mask()
    steps: dict[str, Callable[[], object]] = {
        "noise, 8 x 8 cells": lambda: perlin_noise((size, size), cells=(8, 8), generator=generator),
        "mask (noise, rotation, redraws)": draw_mask,
        f"3 of {len(OPERATIONS)} operations": lambda: alter_texture(
            texture, count=3, generator=generator
        ),
        "blending": lambda: blend_anomaly(normal, texture, mask, opacity=0.4),
    }
    return {
        name: 1e3 * statistics.median(_time(step) for _ in range(100))
        for name, step in steps.items()
    }


def _processor_seconds() -> float:
    """CPU seconds of this process and its ended children (on Windows of this one alone)."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _time(step: Callable[[], object]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def main() -> None:
    """Parse the command line, measure, print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256, help="rows and columns")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    costs: dict[int, list[Cost]] = {workers: [] for workers in arguments.workers}
    with tempfile.TemporaryDirectory() as folder:
        normals, textures = collect_images(Path(folder))
        for _ in range(arguments.repeats):
            for workers, found in costs.items():
                found.append(
                    measure_synthetic_set(
                        normals,
                        textures,
                        samples=arguments.samples,
                        size=arguments.size,
                        workers=workers,
                    )
                )
        steps = measure_steps(normals, textures, size=arguments.size)
    print("processes   samples per second   processor time per sample")
    for workers, found in costs.items():
        rates, milliseconds = zip(*found, strict=True)
        rate = f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"
        print(f"{workers:9d}   {rate:18}   {statistics.median(milliseconds):.2f} ms")
    for name, duration in steps.items():
        print(f"{name:34}{duration:6.2f} ms")
    if arguments.json:
        figures = {
            "synthetic_set": {
                workers: [cost._asdict() for cost in found] for workers, found in costs.items()
            },
            "steps_ms": steps,
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
