"""A light PatchCore on the same split, images, backbone and metrics as ALMRR, as a baseline.

    python benchmarks/baselines/patchcore.py --data ../shared/data --weights FILE
        --category mt_defect [--json FILE]

After Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022 (arXiv
2106.08265), written from the paper: features of the backbone's second and third stage (strides 8
and 16), averaged over 3x3 cells and joined on the finer grid; a memory of them thinned by greedy
k-center; the distance to the nearest one left, enlarged bilinearly and smoothed with sigma 4; the
largest value of the map as the image score. Light, because the greedy choice is made among at most
POOL features drawn at random, in a random projection to 128 dimensions, and because scores are not
reweighted.

It trains on all normal training images; nothing is held out, since no threshold is taken. FILE is
a ResNet-50 with timm's names; for one whose stride is in its 3x3 convolutions, as torchvision's,
add --no-stride-in-1x1.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import torch
from torch import Tensor
from torch.nn import functional

from almrr_pipeline.common.images import read_image, read_mask, resize_image, resize_mask
from almrr_pipeline.config import BackboneSettings, EvaluateSettings
from almrr_pipeline.datasets.manifest import Item
from almrr_pipeline.datasets.registry import dataset_for
from almrr_pipeline.evaluation.evaluate import evaluate
from almrr_pipeline.model.backbone import Backbone, build_backbone

BATCH = 8
PROJECTED = 128
SIGMA = 4.0
logger = logging.getLogger("patchcore")


def embed(
    backbone: Backbone, items: Sequence[Item], size: int, device: torch.device
) -> Iterator[Tensor]:
    """Features of one batch of images after the other.

    Yields:
        float32 (B, C, size / 8, size / 8), C being the channels of both stages together.
    """
    for start in range(0, len(items), BATCH):
        images = [
            resize_image(read_image(item.image), (size, size))
            for item in items[start : start + BATCH]
        ]
        images = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255.0
        _, fine, coarse = (
            functional.avg_pool2d(stage, 3, stride=1, padding=1) for stage in backbone(images)
        )
        coarse = functional.interpolate(
            coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False
        )
        yield torch.cat([fine, coarse], dim=1)


def draw_pool(
    batches: Iterator[Tensor], images: int, pool: int, generator: torch.Generator
) -> Tensor:
    """Draw features evenly from all training images, at most `pool` of them; float32 (n, C)."""
    drawn = []
    for batch in batches:
        cells = batch.permute(0, 2, 3, 1).flatten(1, 2)  # (B, cells, C)
        count = min(cells.shape[1], -(-pool // images))
        for image in cells:
            drawn.append(
                image[torch.randperm(len(image), generator=generator)[:count].to(image.device)]
            )
    return torch.cat(drawn)[:pool]


def choose_core(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Greedy k-center in a random projection: repeatedly the feature farthest from those chosen.

    Returns:
        The chosen rows of `features`, float32 (count, C); all of them if there are no more.
    """
    if len(features) <= count:
        return features
    projection = torch.randn(features.shape[1], PROJECTED, generator=generator) / PROJECTED**0.5
    points = features @ projection.to(features.device)
    squares = points.square().sum(dim=1)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = torch.full_like(squares, torch.inf)
    while len(chosen) < count:
        last = chosen[-1]
        distance = squares - 2.0 * (
            points @ points[last]
        )  # less the constant square of the last point
        nearest = torch.minimum(nearest, distance + squares[last])
        chosen.append(int(nearest.argmax()))
    return features[torch.tensor(chosen, device=features.device)]


def map_distances(
    batches: Iterator[Tensor], core: Tensor, size: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Distance of each cell to the nearest core feature, enlarged and smoothed, (size, size)."""
    for batch in batches:
        for image in batch:
            cells = image.flatten(1).T  # (cells, C)
            distance = torch.cdist(cells, core).amin(dim=1).view(1, 1, *image.shape[1:])
            enlarged = functional.interpolate(
                distance, size=(size, size), mode="bilinear", align_corners=False
            )
            yield scipy.ndimage.gaussian_filter(enlarged[0, 0].cpu().numpy(), sigma=SIGMA)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the memory from the training images and evaluate the test images.

    Returns:
        The metrics, with settings and seconds beside them.
    """
    device = torch.device(arguments.device)
    backbone = build_backbone(
        BackboneSettings(name=arguments.backbone, stride_in_1x1=arguments.stride_in_1x1),
        weights=arguments.weights,
    ).to(device)
    items = dataset_for(arguments.category).items(
        arguments.category, arguments.data / arguments.category
    )
    train, test = ([item for item in items if item.split == split] for split in ("train", "test"))
    generator = torch.Generator().manual_seed(arguments.seed)
    begun = time.perf_counter()
    pool = draw_pool(
        embed(backbone, train, arguments.size, device), len(train), arguments.pool, generator
    )
    logger.info(
        "%d features of %d images after %.0f s", len(pool), len(train), time.perf_counter() - begun
    )
    core = choose_core(pool, arguments.core, generator)
    logger.info("%d of them chosen after %.0f s", len(core), time.perf_counter() - begun)
    maps = list(map_distances(embed(backbone, test, arguments.size, device), core, arguments.size))
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
