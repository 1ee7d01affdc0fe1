"""Many images through `almrr predict --engine ray`: verdicts, and the driver's peak memory.

    python benchmarks/ray_archive.py MODEL_FOLDER [--images 1000 10000] [--broken 50] [--part 256]

makes archives of few images (hard links of twenty, and broken ones), predicts each in a process of
its own on a cluster of this machine, kills one actor in the largest, and compares every verdict
with that of the predictor without Ray.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from PIL import Image

from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.scale.predict_archive import Job, predict_archive

DIFFERENT = 20
OPTIONS = {"device": "cpu", "scan_backend": "torch"}


def make_archive(folder: Path, images: int, broken: int) -> set[int]:
    """Write the images, and return the places of the broken ones."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    kinds = folder.parent / "kinds"
    kinds.mkdir()
    for kind in range(DIFFERENT):
        pixels = generator.integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(kinds / f"{kind:02d}.png")
    torn = set(generator.choice(images, broken, replace=False).tolist())
    for place in range(images):
        target = folder / f"{place:06d}.png"
        if place in torn:
            target.write_bytes(b"no image")
        else:
            os.link(kinds / f"{place % DIFFERENT:02d}.png", target)
    return torn


def predict(job: Job, kills: bool, answer: SimpleQueue[tuple[float, float, int]]) -> None:
    """Predict an archive in this process, the driver, and report seconds and peak MiB."""
    killed: list[int] = []
    if kills:
        threading.Thread(target=kill_one_actor, args=(Path(job.output), killed)).start()
    begin = time.perf_counter()
    predict_archive(job, cpus=1)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answer.put((seconds, peak, len(killed)))


def kill_one_actor(output: Path, killed: list[int]) -> None:
    """Kill a process that holds the model, once the first part is written."""
    while not list(output.glob("verdicts/*.parquet")):
        time.sleep(0.05)
    for process in psutil.process_iter(["cmdline"]):
        if "MapWorker" in " ".join(process.info["cmdline"] or [])[:80]:
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
            return


def count_differences(output: Path, folder: Path, torn: set[int], model: Path) -> int:
    """Rows that are not as without Ray; each image has to have one."""
    found = pd.read_parquet(output / "verdicts").sort_values("image", ignore_index=True)
    paths = sorted(map(str, folder.iterdir()))
    if list(found["image"]) != paths:
        raise SystemExit("not every image has exactly one row")
    expected = list(Predictor(model, **OPTIONS)(sorted((folder.parent / "kinds").iterdir())))
    wrong = 0
    for place, row in enumerate(found.itertuples()):
        if place in torn:
            wrong += not (pd.isna(row.score) and paths[place] in row.reason)
        else:
            right = expected[place % DIFFERENT]
            equal = np.isclose(row.score, right.score, rtol=1e-4)
            wrong += not (equal and row.is_anomalous == right.is_anomalous)
    return wrong


def main() -> None:
    """Print a row for each archive."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--broken", type=int, default=50)
    parser.add_argument("--part", type=int, default=256)
    options = parser.parse_args()
    spawn = get_context("spawn")
    print("images  broken  actors killed  rows that differ  seconds  driver's peak MiB")
    failed = False
    for images in options.images:
        with tempfile.TemporaryDirectory() as scratch:
            folder, output = Path(scratch, "archive"), Path(scratch, "results")
            torn = make_archive(folder, images, options.broken)
            job = Job(
                model=str(options.model.absolute()), output=str(output), images=(str(folder),),
                part_size=options.part, predictor=OPTIONS,
            )  # fmt: skip
            answer = spawn.SimpleQueue()
            driver = spawn.Process(
                target=predict, args=(job, images == max(options.images), answer)
            )
            driver.start()
            driver.join()
            if driver.exitcode:
                sys.exit(f"the driver ended with {driver.exitcode}")
            seconds, peak, killed = answer.get()
            wrong = count_differences(output, folder, torn, options.model)
        failed |= wrong > 0
        print(
            f"{images:6} {len(torn):7} {killed:14} {wrong:17} {seconds:8.1f} {peak:18.0f}",
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
