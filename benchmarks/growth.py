"""How time and memory grow: images of a data set, of a test set, of a prediction; categories; size.

    python benchmarks/growth.py [--only manifest read evaluate predict report tiles] [--quick]

Every row is a process of its own. Time is the processor's, of all threads; memory is what the work
adds to the process at its peak. Files are hard links to a few different ones, networks are small
ones with random weights: what is measured is the way around them.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from timing import measure_peak_memory

Work = Callable[[], object]
DIFFERENT = 50  # files, or maps, that all others are copies of


def link_images(folder: Path, count: int, size: tuple[int, int], name: str = "") -> list[Path]:
    """So many images, of which 50 differ."""
    generator, paths = np.random.default_rng(0), []
    for index in range(count):
        paths.append(folder / f"{name}{index:06d}.png")
        if index < DIFFERENT:
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(paths[-1])
        else:
            os.link(paths[index % DIFFERENT], paths[-1])
    return paths


def build(count: int, folder: Path) -> Work:
    """The manifest of so many images of 64 x 64, each opened."""
    from almrr_pipeline.datasets.manifest import Item, build_manifest

    paths = link_images(folder, count, (64, 64))
    items = [Item(path, None, "train", "normal", "good") for path in paths]
    return lambda: build_manifest(items, root=folder, expected=None, strict=False)


def read(count: int, folder: Path) -> Work:
    """Reading the manifest, and what training and evaluation take from it."""
    from almrr_pipeline.config import DataSettings
    from almrr_pipeline.datasets.manifest import image_reading, read_manifest, training_split

    pd.DataFrame(
        {
            "image": [f"01_raw/x/train/good/{index:06d}.png" for index in range(count)],
            "mask": "",
            "split": ["test" if index % 5 == 0 else "train" for index in range(count)],
            "label": "normal",
            "defect_type": "good",
            "specimen": "",
            "width": 1024,
            "height": 1024,
            "sha256": [f"{index:064x}" for index in range(count)],
            "mode": "I;16",
            "dtype": "uint16",
            "low": 0.0,
            "high": 4000.0,
            "white": "",
        }
    ).to_csv(folder / "manifest.csv", index=False)

    def work() -> None:
        table = read_manifest(folder / "manifest.csv")
        training_split(table, fraction=0.1)
        image_reading(table, DataSettings())

    return work


class Copies:
    """A sequence of arrays of which few differ."""

    def __init__(self, arrays: npt.NDArray[Any], count: int) -> None:
        self._arrays, self._count = arrays, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        return self._arrays[index % DIFFERENT]


def evaluated(count: int) -> tuple[Work, pd.DataFrame]:
    """The evaluation of so many test images of 64 x 64, half of them defective, and its scores."""
    from almrr_pipeline.config import EvaluateSettings
    from almrr_pipeline.evaluation.evaluate import evaluate

    generator = np.random.default_rng(0)
    maps = generator.random((DIFFERENT, 64, 64), dtype=np.float32) * 0.6
    masks = np.zeros(maps.shape, bool)
    masks[1::2, 16:32, 20:36] = True
    maps[masks] += 0.35
    scores, labels = generator.random(count), np.arange(count) % 2 == 1
    types = ["hole" if defective else "good" for defective in labels]
    table = pd.DataFrame(
        {
            "image": [f"{index}.png" for index in range(count)],
            "label": np.where(labels, "defective", "normal"),
            "defect_type": types,
            "score": scores,
        }
    )
    sequences = Copies(maps, count), Copies(masks, count)
    thresholds, settings = (None, None), EvaluateSettings()
    return (
        lambda: evaluate(*sequences, scores, labels, types, settings, thresholds=thresholds),
        table,
    )


def save_model(folder: Path, *, tiling: bool) -> Path:
    """A small network with random weights."""
    from almrr_pipeline.config import BackboneSettings, ModelSettings, Tiling
    from almrr_pipeline.inference.inference_config import InferenceConfig
    from almrr_pipeline.model.almrr import ALMRR
    from almrr_pipeline.model.backbone import build_backbone

    folder.mkdir()
    backbone = build_backbone(BackboneSettings(name="test_resnet"), weights=None)
    sizes = {"latent": 16, "dim": 16, "depth": 1, "state": 4, "refinement_width": 4}
    settings = ModelSettings(decoder=(16, 16), **sizes)
    ALMRR(backbone, settings, image_size=(256, 256)).save(folder)
    cut = Tiling(enabled=tiling)
    InferenceConfig(category="x", image_size=(256, 256), tiling=cut).save(folder)
    return folder


def predict(count: int, folder: Path) -> Work:
    """So many images of 640 x 480, with overlays and maps."""
    from almrr_pipeline.inference.predictor import Predictor
    from almrr_pipeline.reporting.predict_files import predict_files

    predictor = Predictor(save_model(folder / "model", tiling=False), device="cpu")
    images = folder / "images"
    images.mkdir()
    paths = link_images(images, count, (480, 640))
    predict_files(predictor, paths[:16], folder / "first", maps="npy")
    return lambda: predict_files(predictor, paths, folder / "results", maps="npy")


def tiles(megapixels: int, folder: Path) -> Work:
    """One image of so many megapixels in tiles, with overlay and map."""
    from almrr_pipeline.inference.predictor import Predictor
    from almrr_pipeline.reporting.predict_files import predict_files

    predictor = Predictor(save_model(folder / "model", tiling=True), device="cpu")
    columns = round((megapixels * 2e6) ** 0.5)
    small = np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8)
    Image.fromarray(small).resize((columns, columns // 2)).save(folder / "large.jpg")
    first = link_images(folder, 8, (300, 300))
    predict_files(predictor, first, folder / "first", maps="npy")
    return lambda: predict_files(predictor, [folder / "large.jpg"], folder / "out", maps="npy")


def report(count: int, folder: Path) -> Work:
    """The page of so many categories with 100 test images each, its galleries and examples."""
    from almrr_pipeline.config import Parameters
    from almrr_pipeline.evaluation.summary import summarize
    from almrr_pipeline.reporting.examples import Overlay
    from almrr_pipeline.reporting.gallery import build_gallery
    from almrr_pipeline.reporting.page import CategoryReport, Report, render_report

    evaluate, table = evaluated(100)
    evaluation: Any = evaluate()
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (96, 96, 3), dtype=np.uint8)
    anomaly_map = generator.random((64, 64), dtype=np.float32)
    names = list(table["image"])
    gallery = build_gallery(names, lambda _: (image, None, anomaly_map), largest=1, threshold=None)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    steps = np.arange(10, 4010, 10)
    losses = ("loss", "reconstruction", "refinement", "learning_rate")
    history = pd.DataFrame({"step": steps} | dict.fromkeys(losses, np.exp(-steps / 2000)))
    drawn = [Overlay(group, "a.png", stream.getvalue()) for group in ("best", "worst") * 3]
    one = CategoryReport(
        "", 0, evaluation.metrics, history, table, evaluation.curves, drawn, gallery, license="None"
    )
    ids = [f"folder_{index:03d}" for index in range(count)]
    summary = summarize({name: {0: evaluation.metrics} for name in ids})
    runs = [replace(one, category=name) for name in ids]
    content = Report(Parameters(suite="x", categories=ids), runs, summary)

    return lambda: render_report(content)


ROWS: dict[str, tuple[Callable[[int, Path], Work], str, list[int]]] = {
    "manifest": (build, "images opened for a manifest", [1_000, 10_000, 100_000]),
    "read": (read, "rows of a manifest read", [1_000, 10_000, 100_000]),
    "evaluate": (lambda n, _: evaluated(n)[0], "test images evaluated", [100, 1_000, 10_000]),
    "predict": (predict, "images predicted", [100, 500]),
    "report": (report, "categories on a page", [1, 10, 100]),
    "tiles": (tiles, "megapixels in tiles", [1, 4, 16, 64]),
}


def main() -> None:
    """Print the table, or one row of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--quick", action="store_true", help="the first size of each")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        measure(arguments.row[0], int(arguments.row[1]))
        return
    print(
        "| what | count | CPU time, s | added memory, MiB | page |\n| --- | --- | --- | --- | --- |"
    )
    for name in arguments.only:
        sizes = ROWS[name][2]
        for count in sizes[:1] if arguments.quick else sizes:
            command = [sys.executable, __file__, "--row", name, str(count)]
            subprocess.run(command, check=True)


def measure(name: str, count: int) -> None:
    """Print one row of the table."""
    prepare, what, _ = ROWS[name]
    with TemporaryDirectory() as folder:
        work = prepare(count, Path(folder))
        result: list[object] = []
        begin = time.process_time()
        added = measure_peak_memory(lambda: result.append(work())) or 0
        seconds = time.process_time() - begin
        size = f"{len(result[0]) / 1e6:.1f} MB" if isinstance(result[0], str) else ""
        row = f"| {what} | {count:,} | {seconds:.2f} | {added / 2**20:.0f} | {size} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
