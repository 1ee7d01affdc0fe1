"""Kept maps of the backbone change the time of a training on a CPU, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import SIDE, build_model, build_synthetic_set
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from almrr_pipeline.config import BackboneSettings
from almrr_pipeline.model.backbone import build_backbone
from almrr_pipeline.model.fused_backbone import FusedBackbone
from almrr_pipeline.synthesis.synthetic_set import SyntheticSet
from almrr_pipeline.training.features import FeatureCache

IMAGE_BYTES = 4 * sum(
    channels * (SIDE // stride) ** 2
    for channels, stride in zip(build_model().backbone.channels, (4, 8, 16), strict=True)
)
"""Of the tiny model's maps of an image."""
STEPS = 6
"""In batches of 4 of 6 samples: each sample is drawn four times."""


def train_and_count(train: Any, synthetic_set: SyntheticSet, **settings: Any) -> Any:
    """The weights after a few steps, and how many images the backbone embedded."""
    model = build_model(memory_size=0)
    embedded: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        if isinstance(module, FusedBackbone):
            embedded.append(len(inputs[0]))

    with register_module_forward_hook(count):
        train(model, synthetic_set, **{"steps": STEPS, "batch_size": 4, **settings})
    return model.state_dict(), sum(embedded)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def small_set() -> SyntheticSet:
    return build_synthetic_set(samples=6, normals=3, validation=0)


@pytest.mark.parametrize("symmetries", [{}, {"rot90": True, "flips": True}])
def test_kept_features_give_bit_identical_weights(
    train: Any, small_set: SyntheticSet, symmetries: dict[str, bool]
) -> None:
    without, embedded = train_and_count(train, small_set, feature_cache_gb=0.0, **symmetries)
    kept, fewer = train_and_count(train, small_set, **symmetries)
    assert equal(kept, without)
    assert fewer < embedded


def test_each_image_is_embedded_once_and_more_often_where_fewer_fit(
    train: Any, small_set: SyntheticSet
) -> None:
    symmetries = {"rot90": False, "flips": False}
    whole, fewest = train_and_count(train, small_set, **symmetries)
    assert fewest == 3 + 3  # normal images, and samples with an anomaly
    room = 2 * IMAGE_BYTES / 1e9
    part, more = train_and_count(train, small_set, feature_cache_gb=room, **symmetries)
    assert equal(part, whole)
    assert more > fewest


@pytest.mark.parametrize("name", ["test_resnet", "tf_efficientnet_lite0"])
def test_features_that_are_read_are_those_that_were_kept(name: str, tmp_path: Path) -> None:
    backbone = build_backbone(BackboneSettings(name=name), weights=None)
    images = torch.rand(3, 3, 64, 64)
    keys = torch.tensor([5, 2, 9])
    cache = FeatureCache(backbone, tmp_path, limit=1e9, preferred=6)
    first, again = cache(images, keys), cache(torch.zeros_like(images), keys)
    alone = [
        backbone(image[None].contiguous(memory_format=torch.channels_last)) for image in images
    ]
    for one, other, expected in zip(first, again, zip(*alone, strict=True), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, torch.cat(expected))
        assert one.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("room", "kept"),
    [(0.5, []), (2.5, [0, 1]), (3.5, [0, 1, 2]), (4.5, [0, 1, 2, 7]), (9.0, [0, 1, 2, 7, 8])],
)
def test_the_file_keeps_its_bound_and_the_preferred_come_first(
    tmp_path: Path, room: float, kept: list[int]
) -> None:
    backbone = build_model().backbone
    embedded: list[int] = []
    backbone.register_forward_hook(lambda *_: embedded.append(1))
    limit = room * IMAGE_BYTES
    cache = FeatureCache(backbone, tmp_path, limit=limit, preferred=3)
    keys = torch.tensor([7, 8, 0, 1, 2])  # those that are not preferred come first
    images = torch.rand(5, 3, SIDE, SIDE)
    first = cache(images, keys)
    embedded.clear()
    again = cache(images, keys)
    assert len(embedded) == 5 - len(kept)
    assert cache._file.seek(0, 2) == len(kept) * IMAGE_BYTES <= limit
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_half_of_the_free_disk_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=5 * IMAGE_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    cache = FeatureCache(build_model().backbone, tmp_path, limit=1e9, preferred=8)
    cache(torch.rand(4, 3, SIDE, SIDE), torch.arange(4))
    assert cache._file.seek(0, 2) == 2 * IMAGE_BYTES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_is_full_costs_time_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(build_model().backbone, tmp_path, limit=1e9, preferred=8)
    cache._file.close()
    cache._file = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115
    images, keys = torch.rand(2, 3, SIDE, SIDE), torch.arange(2)
    first, again = cache(images, keys), cache(images, keys)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert caplog.text.count("No more features are kept") == 1
    cache._file.close()


def test_a_training_that_resumes_with_kept_features_ends_bit_identical(
    train: Any, small_set: SyntheticSet
) -> None:
    expected, _ = train_and_count(train, small_set)

    class KilledError(Exception):
        pass

    def kill(step: int, _: object) -> None:
        if step == 4:
            raise KilledError

    with pytest.raises(KilledError):
        train_and_count(train, small_set, on_metrics=kill)
    resumed, embedded = train_and_count(train, small_set)
    assert equal(resumed, expected)
    assert embedded > 0
