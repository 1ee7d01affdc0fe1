from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import TrainSettings
from almrr_pipeline.synthesis.synthetic_set import SyntheticSet
from almrr_pipeline.training.augment import apply_symmetries
from almrr_pipeline.training.data import (
    SampleOrder,
    SyntheticBatches,
    build_loader,
    check_synthetic_set,
    choose_residence,
    choose_workers,
    sample_normals,
    to_images,
)


def test_an_epoch_is_a_permutation() -> None:
    order = SampleOrder(count=12, batch_size=4, seed=0)
    first = np.concatenate([order.samples(step) for step in range(3)])
    second = np.concatenate([order.samples(step) for step in range(3, 6)])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()


def test_a_batch_that_crosses_epochs_takes_from_both() -> None:
    order = SampleOrder(count=5, batch_size=4, seed=1)
    drawn = np.concatenate(
        [order.samples(step) for step in range(5)]
    )  # 20 draws: four epochs of five
    assert all(sorted(epoch) == list(range(5)) for epoch in drawn.reshape(4, 5))


def test_a_set_smaller_than_a_batch_fills_it() -> None:
    drawn = SampleOrder(count=3, batch_size=8, seed=1).samples(0)
    assert len(drawn) == 8
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [0, 1, 2]


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    def draw(step: int) -> tuple[list[int], list[int]]:
        order = SampleOrder(count=7, batch_size=4, seed=9)
        return order.samples(step).tolist(), order.symmetries(step).tolist()

    forwards = [draw(step) for step in range(6)]
    backwards = [draw(step) for step in reversed(range(6))]
    assert forwards == backwards[::-1]


def test_another_seed_gives_another_order_and_other_symmetries() -> None:
    one, other = (SampleOrder(count=100, batch_size=50, seed=seed) for seed in (0, 1))
    assert one.samples(0).tolist() != other.samples(0).tolist()
    assert one.symmetries(0).tolist() != other.symmetries(0).tolist()


def test_processes_share_the_batch_of_one() -> None:
    alone = SampleOrder(count=10, batch_size=6, seed=2)
    parts = [
        SampleOrder(count=10, batch_size=6, seed=2, rank=rank, world_size=3) for rank in range(3)
    ]
    for step in range(4):
        together = np.stack([part.samples(step) for part in parts], axis=1).ravel()
        assert together.tolist() == alone.samples(step).tolist()
        transformed = np.stack([part.symmetries(step) for part in parts], axis=1).ravel()
        assert transformed.tolist() == alone.symmetries(step).tolist()


def test_all_eight_symmetries_occur() -> None:
    assert set(SampleOrder(count=10, batch_size=200, seed=0).symmetries(0).tolist()) == set(
        range(8)
    )


def test_they_are_the_eight_symmetries_of_a_square() -> None:
    image = np.arange(12).reshape(2, 2, 3)
    transformed = apply_symmetries(
        torch.from_numpy(np.stack([image] * 8)), torch.arange(8, dtype=torch.uint8)
    ).numpy()
    rot90 = [np.rot90(one, k) for one in (image, image[:, ::-1]) for k in range(4)]
    assert {one.tobytes() for one in transformed} == {
        np.ascontiguousarray(one).tobytes() for one in rot90
    }


def test_symmetries_of_a_hand_worked_image() -> None:
    image = torch.tensor([[[1, 2], [3, 4]]])
    assert apply_symmetries(image, torch.tensor([1], dtype=torch.uint8)).tolist() == [
        [[2, 1], [4, 3]]
    ]
    assert apply_symmetries(image, torch.tensor([2], dtype=torch.uint8)).tolist() == [
        [[3, 4], [1, 2]]
    ]
    assert apply_symmetries(image, torch.tensor([4], dtype=torch.uint8)).tolist() == [
        [[1, 3], [2, 4]]
    ]


def test_an_image_that_is_not_square_keeps_its_shape() -> None:
    images = torch.arange(12).view(2, 2, 3)
    transformed = apply_symmetries(images, torch.tensor([4, 5], dtype=torch.uint8))
    assert transformed[0].tolist() == images[0].tolist()
    assert transformed[1].tolist() == images[1].flip(1).tolist()


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_are_floats_between_zero_and_one(channels_last: bool) -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 4, 5, 3)
    images = to_images(images, channels_last=channels_last)
    torch.testing.assert_close(images[:, :, 0, 0], torch.tensor([0.0, 0.2, 1.0]).expand(2, 3))
    assert images.shape == (2, 3, 4, 5)
    assert images.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def test_a_batch_holds_what_the_synthetic_set_holds(synthetic_set: Any) -> None:
    order = SampleOrder(
        count=len(synthetic_set.augmented), batch_size=4, seed=0, flips=False, rot90=False
    )
    batch = SyntheticBatches(synthetic_set, order, device=None)[2]
    samples = order.samples(2)
    np.testing.assert_array_equal(batch["augmented"], synthetic_set.augmented[samples])
    np.testing.assert_array_equal(batch["mask"], synthetic_set.masks[samples])
    np.testing.assert_array_equal(
        batch["normal"], synthetic_set.normals[synthetic_set.normal_index[samples]]
    )


def test_normal_augmented_and_mask_are_transformed_together(synthetic_set: Any) -> None:
    order = SampleOrder(count=len(synthetic_set.augmented), batch_size=8, seed=0)
    batch = SyntheticBatches(synthetic_set, order, device=None)[0]
    assert set(order.symmetries(0)) != {0}
    changed = (batch["normal"] != batch["augmented"]).any(-1)
    assert changed.any()
    assert torch.equal(changed, batch["mask"])  # the anomaly's gray differs from every normal pixel


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("rot90", [False, True])
def test_each_variation_can_be_left_out(synthetic_set: Any, flips: bool, rot90: bool) -> None:
    order = SampleOrder(
        count=len(synthetic_set.augmented), batch_size=32, seed=0, flips=flips, rot90=rot90
    )
    batch = SyntheticBatches(synthetic_set, order, device=None)[0]
    allowed = [
        bits for bits in range(8) if (flips or not bits & 0b011) and (rot90 or not bits & 0b100)
    ]
    met = set()
    for sample, image in zip(order.samples(0), batch["augmented"], strict=True):
        kept = torch.from_numpy(synthetic_set.augmented[sample])[None]
        transformed = [
            apply_symmetries(kept, torch.tensor([bits], dtype=torch.uint8))[0] for bits in range(8)
        ]
        met |= {bits for bits in range(8) if torch.equal(transformed[bits], image)}
    assert met == set(allowed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_synthetic_set_on_the_device_gives_the_same_batches(
    synthetic_set: Any, device: str
) -> None:
    order = SampleOrder(count=len(synthetic_set.augmented), batch_size=4, seed=0)
    mapped = SyntheticBatches(synthetic_set, order, device=None)
    resident = SyntheticBatches(synthetic_set, order, device=torch.device(device))
    for step in range(3):
        expected: dict[str, Any] = dict(mapped[step])
        if device == "cuda":
            del expected["keys"]  # a GPU keeps no features
        given: dict[str, Any] = dict(resident[step])
        assert given.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(value, given[name].cpu())


def map_synthetic_set(synthetic_set: SyntheticSet, folder: Path) -> SyntheticSet:
    """Put a synthetic set's arrays on disk and open them as memory maps."""
    arrays = {}
    for name in ("normals", "augmented", "masks"):
        np.save(folder / f"{name}.npy", getattr(synthetic_set, name))
        arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return replace(synthetic_set, **arrays)


def test_a_memory_mapped_synthetic_set_travels_by_name(synthetic_set: Any, tmp_path: Path) -> None:
    synthetic_set = map_synthetic_set(synthetic_set, tmp_path)
    batches = SyntheticBatches(
        synthetic_set, SampleOrder(count=10, batch_size=4, seed=0), device=None
    )
    written = io.BytesIO()
    pickle.dump(batches, written)
    assert written.tell() < 5_000
    assert torch.equal(pickle.loads(written.getvalue())[1]["augmented"], batches[1]["augmented"])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_begins_at_the_step_to_resume_from(
    synthetic_set: Any, tmp_path: Path, workers: int
) -> None:
    synthetic_set = map_synthetic_set(synthetic_set, tmp_path)
    batches = SyntheticBatches(
        synthetic_set, SampleOrder(count=10, batch_size=4, seed=0), device=None
    )
    settings = TrainSettings(steps=5, batch_size=4, workers=workers)
    fabric = Fabric(accelerator="cpu", devices=1)
    whole = list(build_loader(synthetic_set, settings, fabric, seed=0, first=0))
    rest = list(build_loader(synthetic_set, settings, fabric, seed=0, first=2))
    assert len(whole) == 5
    assert len(rest) == 3
    for step, batch in enumerate(rest, start=2):
        assert torch.equal(batch["augmented"], batches[step]["augmented"])
        assert torch.equal(batch["augmented"], whole[step]["augmented"])


def test_statistics_see_an_even_choice_of_the_normal_images() -> None:
    normals = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    seen = torch.cat(list(sample_normals(normals, 12)))[:, 0, 0, 0] * 255
    assert seen.round().tolist() == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]
    assert len(torch.cat(list(sample_normals(normals, 1000)))) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augmented": np.zeros((0, 128, 128, 3), np.uint8)}, "empty"),
        (
            {"masks": np.zeros((9, 128, 128), bool)},
            "10 augmented images, 9 masks and 10 normal indices",
        ),
        ({"normal_index": np.full(10, 3)}, "normal indices 3 to 3 for 3 normal images"),
        ({"masks": np.zeros((10, 64, 64), bool)}, r"\(64, 64\) and \(128, 128\)"),
    ],
)
def test_a_synthetic_set_that_cannot_be_trained_on_is_refused(
    synthetic_set: Any, change: dict[str, np.ndarray], message: str
) -> None:
    changed = replace(synthetic_set, **change)
    with pytest.raises(AlmrrError, match=message):
        check_synthetic_set(changed, image_size=(128, 128))


def test_a_synthetic_set_of_another_size_than_the_models_is_refused(synthetic_set: Any) -> None:
    with pytest.raises(AlmrrError, match=r"the model's input is \(256, 256\)"):
        check_synthetic_set(synthetic_set, image_size=(256, 256))


def test_loader_processes(synthetic_set: Any) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_residence(synthetic_set, cpu) is None
    assert choose_workers(0, device=cpu, resident=False) == 0
    assert choose_workers(3, device=cpu, resident=False) == 3
    assert choose_workers(3, device=gpu, resident=True) == 0
    assert 1 <= choose_workers(0, device=gpu, resident=False) <= 4


@pytest.mark.gpu
def test_a_small_synthetic_set_is_copied_to_the_gpu(synthetic_set: Any) -> None:
    assert choose_residence(synthetic_set, torch.device("cuda", 0)) == torch.device("cuda", 0)
