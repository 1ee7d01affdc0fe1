"""The features of a sample's own specimen do not count where its distances are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import SIDE, build_model, build_synthetic_set

from almrr_pipeline.config import TrainSettings
from almrr_pipeline.training.data import (
    SampleOrder,
    SyntheticBatches,
    draw_normals,
    number_owners,
    to_images,
)
from almrr_pipeline.training.train import MEMORY_IMAGES, TrainingStep


def test_crops_of_an_image_and_images_of_a_specimen_have_one_owner() -> None:
    crops = build_synthetic_set(normals=7)
    crops.description["training_images"] = ["a", "b", "c"]
    owners: Any = number_owners(crops, {"a": "tile 1", "c": "tile 1", "b": ""})  # type: ignore[arg-type]
    assert owners.tolist() == [0, 1, 0, 0, 1, 0, 0]  # rows a b c a b c a


def test_images_without_names_own_themselves() -> None:
    assert number_owners(build_synthetic_set(normals=3), {}).tolist() == [0, 1, 2]  # type: ignore[arg-type]


def test_normals_are_drawn_evenly_with_their_owners() -> None:
    synthetic_set: Any = build_synthetic_set(normals=20)
    plain = TrainSettings(flips=False, rot90=False)
    batches = list(draw_normals(synthetic_set, torch.arange(20), plain, count=10, seed=3))
    owners = torch.cat([owners for _, owners in batches])
    assert [len(images) for images, _ in batches] == [8, 2]
    assert owners.tolist() == [0, 2, 4, 6, 8, 11, 13, 15, 17, 19]
    rows = torch.from_numpy(synthetic_set.normals[owners.numpy()])
    expected = to_images(rows, channels_last=False)
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
    turned = list(draw_normals(synthetic_set, torch.arange(20), TrainSettings(), count=10, seed=3))
    assert not torch.equal(turned[0][0], batches[0][0])
    assert len(torch.cat([images for images, _ in turned])) == 10


def test_a_batch_names_the_normal_images_it_was_made_of() -> None:
    synthetic_set: Any = build_synthetic_set(samples=6, normals=3)
    order = SampleOrder(6, 4, seed=0)
    batch = SyntheticBatches(synthetic_set, order, device=None)[0]
    assert batch["sources"].tolist() == (order.samples(0) % 3).tolist()


def test_a_step_leaves_out_the_samples_own_features() -> None:
    synthetic_set: Any = build_synthetic_set(samples=6, normals=3)
    model = build_model(memory_size=4, standardize=True)
    seen: list[Any] = []
    model.memory.register_forward_hook(lambda _, inputs, out: seen.append((inputs[1], out)))
    images = torch.rand(4, 3, SIDE, SIDE)
    model.fill_memory([(images, torch.tensor([0, 0, 1, 1]))], images=4, seed=0)
    owners = torch.tensor([0, 0, 1])
    settings = TrainSettings(batch_size=4)
    step = TrainingStep(model, settings, owners=owners)
    batch = SyntheticBatches(synthetic_set, SampleOrder(6, 4, seed=0), device=None)[0]
    step(batch)
    [(left_out, distances)] = seen
    assert left_out.tolist() == owners[batch["sources"]].tolist()
    assert bool(distances.isfinite().all())


def test_validation_images_tell_what_a_new_normal_image_is_far_from(
    train: Any, tmp_path: Path
) -> None:
    synthetic_set = build_synthetic_set(normals=3)
    model = build_model(standardize=True, memory_size=8, memory_input=False, memory_exponent=2.0)
    train(model, synthetic_set, steps=1, batch_size=2)
    images = torch.from_numpy(synthetic_set.validation_normals.copy()).permute(0, 3, 1, 2) / 255
    evidence = model.memory.evidence(model.memory(model.embed(images)))
    assert float(evidence.square().mean()) == pytest.approx(1.0, rel=1e-3)


def test_training_fills_the_memory_from_normal_images_alone(train: Any, tmp_path: Path) -> None:
    synthetic_set = build_synthetic_set(normals=3)
    model = build_model(standardize=True, memory_size=8)
    train(model, synthetic_set, steps=1, batch_size=2)
    assert set(model.memory.owner.tolist()) == {0, 1, 2}
    assert MEMORY_IMAGES > 3
    again = build_model(standardize=True, memory_size=8)
    synthetic_set.augmented[:] = 0
    train(again, synthetic_set, steps=1, batch_size=2)
    assert torch.equal(model.memory.core, again.memory.core)
