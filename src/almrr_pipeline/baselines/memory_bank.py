"""Memory bank of patch features: a light PatchCore on the backbone that ALMRR has too.

After Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022 (arXiv
2106.08265), written from the paper: features of the backbone's second and third stage (strides 8
and 16), averaged over 3x3 cells and joined on the finer grid; a memory of them thinned by greedy
k-center; the distance to the nearest one left, enlarged bilinearly and smoothed with sigma 4; the
largest value of the map as the image score. Light, because the greedy choice is made among
features drawn at random, in a random projection, and because scores are not reweighted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional

from almrr_pipeline.common.images import Reading
from almrr_pipeline.common.region import Region
from almrr_pipeline.config import Tiling
from almrr_pipeline.inference.map_predictor import MapPredictor, resolve_device
from almrr_pipeline.model.backbone import Backbone
from almrr_pipeline.model.inputs import find_counted_cells
from almrr_pipeline.model.memory import choose_core, draw_cells


@dataclass(frozen=True)
class BankSettings:
    """Features of a memory bank: in a second or ten of one core; docs/results.md has larger ones.

    Attributes:
        pool: drawn from all images, among which the core is chosen.
        core: kept, at most.
        seed: of both choices.
    """

    pool: int = 20_000
    core: int = 2_000
    seed: int = 0


SIGMA = 4.0  # pixels, the paper's


def embed(backbone: Backbone, images: Tensor) -> Tensor:
    """Patch features of images, (B, 3, H, W) in [0, 1] -> (B, C, H / 8, W / 8)."""
    _, fine, coarse = (
        functional.avg_pool2d(stage, 3, stride=1, padding=1) for stage in backbone(images)
    )
    size = fine.shape[-2:]
    coarse = functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    return torch.cat([fine, coarse], dim=1)


class _FeatureCollector(nn.Module):
    """Collects features of all images, evenly, where a network would map them."""

    def __init__(
        self, backbone: Backbone, per_image: int, generator: torch.Generator, has_region: bool
    ) -> None:
        super().__init__()
        self.has_region = has_region
        self.backbone, self.per_image, self.generator = backbone, per_image, generator
        self.drawn: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """Draw features of each image without replacement; the maps returned are 0."""
        features = embed(self.backbone, images)
        grid = features.shape[-2], features.shape[-1]
        counted = find_counted_cells(images, grid) if self.has_region else None
        self.drawn += draw_cells(features, self.per_image, self.generator, counted)
        return images.new_zeros(len(images), *images.shape[-2:])


class MemoryBank(nn.Module):
    """Distance of each patch to the nearest remembered one, enlarged and smoothed."""

    def __init__(self, backbone: Backbone, core: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.core = nn.Buffer(core)  # float32 (n, C)

    def forward(self, images: Tensor) -> Tensor:
        """Map images, (B, 3, H, W) in [0, 1] -> float32 (B, H, W), at least 0, unbounded."""
        features = embed(self.backbone, images)
        distances = torch.stack(
            [torch.cdist(cells, self.core).amin(dim=1) for cells in features.flatten(2).mT]
        )
        grid = distances.view(len(images), 1, *features.shape[-2:])
        enlarged = functional.interpolate(
            grid, size=images.shape[-2:], mode="bilinear", align_corners=False
        )
        smoothed = gaussian_filter(enlarged[:, 0].cpu().numpy(), sigma=(0.0, SIGMA, SIGMA))
        return torch.from_numpy(smoothed)


def build_memory_bank(
    backbone: Backbone,
    images: Sequence[Path],
    image_size: tuple[int, int],
    tiling: Tiling,
    *,
    settings: BankSettings = BankSettings(),
    device: str = "auto",
    reading: Reading | None = None,
    region: Region | None = None,
) -> MapPredictor:
    """Remember features of normal training images, whole or in tiles as ALMRR takes them.

    Args:
        backbone: frozen; moved to the device.
        images: normal training images.
        image_size: rows and columns of the network's input.
        tiling: whether and how images are cut.
        settings: how many features are drawn and kept.
        device: as for `resolve_device`, which may raise AlmrrError.
        reading: how image files become 8-bit RGB.
        region: what of the images counts; no features are remembered of the rest.

    Returns:
        A predictor of anomaly maps, whose values are distances.
    """
    target = resolve_device(device)
    generator = torch.Generator().manual_seed(settings.seed)
    per_image = max(1, -(-settings.pool // len(images)))
    collector = _FeatureCollector(backbone.to(target), per_image, generator, region is not None)
    predictor = MapPredictor(
        collector.eval(), image_size, tiling, 8, target, reading, region, concurrent=False
    )
    for _ in predictor.maps(images):
        pass
    features = torch.cat(collector.drawn)
    pool = torch.randperm(len(features), generator=generator)[: settings.pool]
    features = features[pool.to(target)]
    chosen = choose_core(features, settings.core, generator).to(target)
    bank = MemoryBank(backbone, features[chosen]).eval()
    return replace(predictor, model=bank, concurrent=True)
