"""The exported network in onnxruntime and OpenVINO, against torch and the bare backbone.

    python benchmarks/export.py MODEL_FOLDER [--batch 8] [--repeats 15]

CPU time with one thread, so that other work on the machine disturbs little; the ways take turns,
and each is divided by the backbone alone, channels last. Without test-time augmentation.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from almrr_pipeline.inference.export import export_onnx
from almrr_pipeline.inference.fuse import fuse
from almrr_pipeline.inference.runtimes import ExportedNetwork
from almrr_pipeline.model.almrr import ALMRR

BACKBONE = "bare backbone, channels last"


def main() -> None:
    """Print the export's CPU time and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_folder", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = ALMRR.load(arguments.model_folder).eval()
    images = torch.rand(arguments.batch, 3, *model.image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    backbone = model.backbone.to(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], object]] = {BACKBONE: partial(backbone, images)}
    ways["torch, fused"] = partial(fuse(model), images)
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder, "model.onnx"), time.process_time()
        export_onnx(model, path)
        print(f"Export to ONNX: {time.process_time() - start:.1f} CPU-seconds\n")
        for runtime in ("onnxruntime", "openvino"):
            ways[runtime] = partial(ExportedNetwork(path, runtime), images)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(arguments.repeats + 2):  # two that do not count
            for name, way in ways.items():
                start = time.process_time()
                way()
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(each[2:]) for name, each in seconds.items()}
    print("| way | CPU ms an image | over the backbone |\n| --- | --- | --- |")
    for name, median in medians.items():
        milliseconds = median * 1e3 / arguments.batch
        print(f"| {name} | {milliseconds:.1f} | {median / medians[BACKBONE]:.2f} |")


if __name__ == "__main__":
    main()
