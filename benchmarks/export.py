"""The exported network in onnxruntime and OpenVINO, against torch and the bare backbone.

    python benchmarks/export.py [MODEL_FOLDER] [--batch 8] [--repeats 15] [--threads N]

Milliseconds an image, wall-clock and CPU, in float32 and without test-time augmentation; the ways
take turns, and each is divided by the backbone alone, channels last. All have all cores, in two
manners: several batches at a time, each by its part of the threads, as `MapPredictor` maps many
images, and batch after batch. With `--threads 1`, where both are the same, CPU time tells on a
machine with other work too. Without a model folder it is the light network of
conf/budget/laptop.yaml at 256 x 256 with random weights, which take the same time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from prediction import save_model
from timing import read_clocks, tabulate_clocks
from torch import Tensor

from almrr_pipeline.inference.export import export_onnx
from almrr_pipeline.inference.fuse import fuse
from almrr_pipeline.inference.runtimes import ExportedNetwork
from almrr_pipeline.inference.threads import batches_at_once, start_torch_workers
from almrr_pipeline.model.almrr import ALMRR

BACKBONE = "bare backbone, channels last"
Way = Callable[[], object]
Times = dict[str, list[tuple[float, float]]]  # of each way, wall-clock and CPU seconds of rounds


def main() -> None:
    """Print the export's CPU time and a table for each manner."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_folder", type=Path, nargs="?")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(arguments.model_folder, Path(folder))
        ways = build_ways(model, arguments.batch, Path(folder))
    at_once = batches_at_once()
    together: Times = {name: [] for name in ways}
    alone: Times = {name: [] for name in ways}
    with start_torch_workers(at_once, threads=arguments.threads // at_once) as workers:
        for _ in range(arguments.repeats + 2):  # two that do not count
            for name, way in ways.items():
                together[name].append(read_clocks(partial(call_in_all, workers, at_once, way)))
                alone[name].append(read_clocks(way))
    print_table(f"{at_once} batches at a time", together, at_once * arguments.batch)
    if at_once > 1:
        print_table("Batch after batch", alone, arguments.batch)


def print_table(title: str, times: Times, images: int) -> None:
    """Times an image; two rounds do not count."""
    counted = {name: each[2:] for name, each in times.items()}
    table = tabulate_clocks(counted, unit="an image", over="the backbone", units=images)
    print(f"\n{title}:\n\n{table}")


def load_model(folder: Path | None, own: Path) -> ALMRR:
    """The model of a folder or, in a folder of our own, one with random weights."""
    if folder is None:
        folder = own / "random"
        save_model(folder, flips=False)
    return ALMRR.load(folder).eval()


def build_ways(model: ALMRR, batch: int, folder: Path) -> dict[str, Way]:
    """The backbone, and the network fused and exported, each on one batch of noise."""
    images = torch.rand(batch, 3, *model.image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    backbone = model.backbone.to(memory_format=torch.channels_last)
    networks: dict[str, Callable[[Tensor], object]] = {BACKBONE: backbone}
    networks["torch, fused"] = fuse(model)
    path, start = folder / "model.onnx", time.process_time()
    export_onnx(model, path)
    print(f"Export to ONNX: {time.process_time() - start:.1f} CPU-seconds")
    for runtime in ("onnxruntime", "openvino"):
        networks[runtime] = ExportedNetwork(path, runtime)
    return {name: partial(call, network, images) for name, network in networks.items()}


@torch.inference_mode()
def call(network: Callable[[Tensor], object], images: Tensor) -> None:
    """Map a batch, and drop the maps."""
    network(images)


def call_in_all(workers: ThreadPoolExecutor, count: int, way: Way) -> None:
    """Map as many batches as there are workers, at the same time."""
    for mapped in [workers.submit(way) for _ in range(count)]:
        mapped.result()


if __name__ == "__main__":
    main()
