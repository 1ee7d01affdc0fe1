"""Simulated anomalies per second by number of processes, from pictures on disk to a finished pool.

    python benchmarks/synthesis.py [--samples 2000] [--size 256] [--workers 1 2] [--repeats 3] [--json FILE]

Normal pictures and anomaly sources are those of the sample suite. The time includes starting the processes, decoding
and resizing all pictures, and writing the pool. Each figure is the median of the repeats with their least and greatest.
The second table says what one anomaly costs, step by step, in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from almrr_pipeline.images import read_image, resize_image
from almrr_pipeline.sources.package_textures import write_package_textures
from almrr_pipeline.sources.registry import FetchRequest, source_for
from almrr_pipeline.synthesis.blend import blend_anomaly
from almrr_pipeline.synthesis.perlin import perlin_mask, perlin_noise
from almrr_pipeline.synthesis.pool import simulate_pool
from almrr_pipeline.synthesis.textures import OPERATIONS, alter_texture

CATEGORY = "sample_gravel"


def collect_pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Write the sample suite's pictures; returns normal pictures and anomaly sources."""
    (folder / CATEGORY).mkdir()
    (folder / "textures").mkdir()
    source = source_for(CATEGORY)
    source.fetch(CATEGORY, target=folder / CATEGORY, request=FetchRequest(scratch=folder / "scratch"))
    write_package_textures(folder / "textures")
    normals = [item.image for item in source.items(CATEGORY, folder / CATEGORY) if item.split == "train"]
    return normals, sorted((folder / "textures").iterdir())


def measure_pool(folder: Path, *, samples: int, size: int, workers: int) -> float:
    """Simulate a pool once; returns samples per second."""
    normals, textures = collect_pictures(folder)
    pool = simulate_pool(
        normals, [], textures, root=folder, image_size=(size, size), samples=samples, seed=0, workers=workers
    )
    (folder / "pool").mkdir()
    begun = time.perf_counter()
    pool.save(folder / "pool")
    return samples / (time.perf_counter() - begun)


def measure_steps(folder: Path, *, size: int) -> dict[str, float]:
    """Time the steps of one simulated anomaly; returns milliseconds, medians of 100 draws."""
    normals, textures = collect_pictures(folder)
    normal, texture = (resize_image(read_image(paths[0]), (size, size)) for paths in (normals, textures))
    generator = np.random.default_rng(0)
    mask = perlin_mask((size, size), generator=generator)
    steps: dict[str, Callable[[], object]] = {
        "noise, 8 x 8 cells": lambda: perlin_noise((size, size), cells=(8, 8), generator=generator),
        "mask (noise, rotation, redraws)": lambda: perlin_mask((size, size), generator=generator),
        f"3 of {len(OPERATIONS)} operations": lambda: alter_texture(texture, count=3, generator=generator),
        "blending": lambda: blend_anomaly(normal, texture, mask, opacity=0.4),
    }
    return {name: 1e3 * statistics.median(_time(step) for _ in range(100)) for name, step in steps.items()}


def _time(step: Callable[[], object]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def main() -> None:
    """Parse the command line, measure, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256, help="rows and columns")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    rates: dict[int, list[float]] = {workers: [] for workers in arguments.workers}
    for _ in range(arguments.repeats):
        for workers, found in rates.items():
            with tempfile.TemporaryDirectory() as folder:
                found.append(
                    measure_pool(Path(folder), samples=arguments.samples, size=arguments.size, workers=workers)
                )
    with tempfile.TemporaryDirectory() as folder:
        steps = measure_steps(Path(folder), size=arguments.size)
    print("processes  samples per second")
    for workers, found in rates.items():
        print(f"{workers:9d}  {statistics.median(found):.0f} ({min(found):.0f}-{max(found):.0f})")
    for name, milliseconds in steps.items():
        print(f"{name:34}{milliseconds:6.2f} ms")
    if arguments.json:
        figures = {"samples_per_second": rates, "milliseconds": steps}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
