"""The authors' formulation, which ours is measured against, computes the same function."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from almrr_pipeline.config import BackboneSettings, ModelSettings
from almrr_pipeline.model.backbone import Backbone, build_backbone

SMALL = ModelSettings(latent=16, dim=16, depth=2, state=4, decoder=(8, 12), refinement_width=4)


def build_resnet() -> Backbone:
    return build_backbone(BackboneSettings(name="test_resnet"), weights=None)


@pytest.fixture
def authors(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(project / "benchmarks")
    yield import_module("baselines.authors")
    sys.modules.pop("baselines.authors", None)


@pytest.mark.parametrize("scan", ["indexed", "torch"])
def test_both_formulations_give_the_same_map(authors: ModuleType, scan: str) -> None:
    torch.manual_seed(0)
    theirs = (
        authors.AuthorsALMRR(build_resnet(), SMALL, image_size=(128, 128), scan=scan)
        .double()
        .eval()
    )
    images = torch.rand(2, 3, 128, 128, dtype=torch.float64)
    theirs.model.frm.out.weight.data *= 100.0
    expected = theirs.model(images).detach()
    assert float(expected.std()) > 0.01
    # Their scan is float32 inside; the matrices of the regional features are rounded to it.
    torch.testing.assert_close(theirs(images).detach(), expected, rtol=0, atol=1e-4)


def test_their_backbone_gets_gradients_that_nobody_uses(authors: ModuleType) -> None:
    torch.manual_seed(0)
    theirs = authors.AuthorsALMRR(build_resnet(), SMALL, image_size=(128, 128)).train()
    images = torch.rand(2, 3, 128, 128)
    out = theirs.training_forward(images, images)
    (
        torch.nn.functional.mse_loss(out.reconstruction, out.target) - out.logits[:, 1].mean()
    ).backward()
    (extractor,) = theirs._extractor
    assert all(parameter.grad is not None for parameter in extractor.parameters())
    owned = {id(parameter) for parameter in theirs.parameters() if parameter.requires_grad}
    assert owned == {id(parameter) for parameter in theirs.model.trainable_parameters()}
    assert not owned & {id(parameter) for parameter in extractor.parameters()}
