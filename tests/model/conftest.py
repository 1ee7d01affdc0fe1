"""Small models for the tests of the model's parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.config import BackboneSettings, ModelSettings
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone

SIZE = (128, 160)
SMALL: dict[str, Any] = {
    "latent": 24,
    "dim": 16,
    "depth": 2,
    "state": 4,
    "decoder": (8, 12),
    "refinement_width": 4,
}
BuildModel = Callable[..., ALMRR]


@pytest.fixture(scope="session")
def build_model() -> BuildModel:
    """Builds a small model in evaluation mode whose maps vary; keywords replace small values."""
    built: dict[str, ALMRR] = {}

    def build(
        backbone: str = "test_resnet", feature_location: str = "bottleneck", **changes: Any
    ) -> ALMRR:
        key = repr((backbone, feature_location, sorted(changes.items())))
        if key not in built:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                options = BackboneSettings(name=backbone, feature_location=feature_location)  # type: ignore[arg-type]
                network = build_backbone(options, weights=None)
                size = changes.pop("image_size", SIZE)
                settings = ModelSettings(**(SMALL | changes))
                built[key] = ALMRR(network, settings, image_size=size, scan_backend="torch")
                make_lively(built[key])
        return copy.deepcopy(built[key])

    return build


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Two images of the small size with coarse and fine structure, (2, 3, 128, 160)."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return draw_images(2, (128, 160))


def draw_images(count: int, size: tuple[int, int]) -> Tensor:
    """Coarse blots of color with a little noise."""
    blots = F.interpolate(torch.rand(count, 3, 6, 7), size=size, mode="bicubic")
    return (blots + 0.2 * torch.rand(count, 3, *size) - 0.1).clamp(0.0, 1.0)


@torch.no_grad()
def make_lively(model: ALMRR) -> None:
    """Give a model what training would: fitting statistics, no zero weights, maps from 0 to 1."""
    images = draw_images(4, model.image_size)
    norms = [module for module in model.frm.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = 1.0
    if model.settings.standardize:
        model.fit_standardization([images])
    model.train().training_forward(images, images)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()
    features = model.embed(images)
    logits = model.refine(model.reconstruct(features), features)
    difference = logits[:, 1] - logits[:, 0]
    model.frm.out.weight /= difference.std()
    model.frm.out.bias /= difference.std()
    model.frm.out.bias[0] += difference.mean() / difference.std()
