"""A light PatchCore on the same split, images, backbone and metrics as ALMRR, as a baseline.

    python benchmarks/baselines/patchcore.py --data ../shared/data --weights FILE
        --category mt_defect [--json FILE]

The memory bank of almrr_pipeline/baselines/memory_bank.py, by default with a larger memory than the
pipeline's, and with intervals.

It trains on all normal training images; nothing is held out, since no threshold is taken. FILE is
a ResNet-50 with timm's names; for one whose stride is in its 3x3 convolutions, as torchvision's,
add --no-stride-in-1x1.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from almrr_pipeline.baselines.memory_bank import BankSettings, build_memory_bank
from almrr_pipeline.common.masks import read_mask, resize_mask
from almrr_pipeline.config import BackboneSettings, EvaluateSettings, Tiling
from almrr_pipeline.datasets.registry import dataset_for
from almrr_pipeline.evaluation.evaluate import evaluate
from almrr_pipeline.model.backbone import build_backbone

logger = logging.getLogger("patchcore")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the memory from the training images and evaluate the test images.

    Returns:
        The metrics, with settings and seconds beside them.
    """
    backbone = build_backbone(
        BackboneSettings(name=arguments.backbone, stride_in_1x1=arguments.stride_in_1x1),
        weights=arguments.weights,
    )
    items = dataset_for(arguments.category).items(
        arguments.category, arguments.data / arguments.category
    )
    train, test = ([item for item in items if item.split == split] for split in ("train", "test"))
    begun = time.perf_counter()
    bank = build_memory_bank(
        backbone,
        [item.image for item in train],
        (arguments.size,) * 2,
        Tiling(),
        settings=BankSettings(arguments.pool, arguments.core, arguments.seed),
        device=arguments.device,
    )
    logger.info("memory bank after %.0f s", time.perf_counter() - begun)
    maps = [scaled.anomaly_map for scaled in bank.maps(item.image for item in test)]
    seconds = time.perf_counter() - begun
    logger.info("%d test images mapped after %.0f s", len(test), seconds)
    found = evaluate(
        maps,
        [
            None if item.mask is None else resize_mask(read_mask(item.mask), (arguments.size,) * 2)
            for item in test
        ],
        [float(values.max()) for values in maps],
        [item.label == "defective" for item in test],
        [item.defect_type for item in test],
        EvaluateSettings(bootstrap=arguments.bootstrap),
        thresholds=(None, None),
        seed=arguments.seed,
    )
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
    }
    return {**found.metrics, "settings": settings, "train_images": len(train), "seconds": seconds}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with one folder a category, as fetched"
    )
    parser.add_argument(
        "--category", required=True, help="category id, such as mt_defect or nanotwice"
    )
    parser.add_argument("--weights", type=Path, required=True, help="the backbone's weights")
    parser.add_argument(
        "--backbone", default="resnet50.tv_in1k", help="timm's name of the backbone"
    )
    parser.add_argument(
        "--stride-in-1x1",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Caffe-style ResNet",
    )
    parser.add_argument(
        "--size", type=int, default=256, help="edge of the network's input, in pixels"
    )
    parser.add_argument(
        "--pool", type=int, default=100_000, help="features among which the core is chosen"
    )
    parser.add_argument("--core", type=int, default=5000, help="features that are kept")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, help="resamplings for the 95 %% intervals"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args()


def main() -> None:
    """Run, and print each metric with its interval."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    figures = run(arguments)
    for name, value in figures.items():
        if isinstance(value, float):
            low, high = figures["intervals"].get(name, (float("nan"),) * 2)
            print(
                f"{name:24}{value:8.4f}   {low:.4f} to {high:.4f}"
                if low == low
                else f"{name:24}{value:8.4f}"
            )
    for name, reason in figures["undefined"].items():
        print(f"{name:24}undefined: {reason}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
