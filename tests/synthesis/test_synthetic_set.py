from __future__ import annotations

import hashlib
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from almrr_pipeline.config import Tiling
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import read_image, resize_image
from almrr_pipeline.synthesis.synthetic_set import LEAST_WORK, SyntheticSet, PlannedSyntheticSet, synthesize

SIZE = (48, 32)
OPENED: list[str] = []
"""Every file that this process opens while WATCHING is set."""
WATCHING = threading.Event()


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and WATCHING.is_set() and isinstance(arguments[0], str | bytes | Path):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_note_opened)


def describe(images: SimpleNamespace, **changes: Any) -> PlannedSyntheticSet:
    arguments: dict[str, Any] = {
        "root": images.root,
        "image_size": SIZE,
        "samples": 40,
        "seed": 3,
        "workers": 1,
        **changes,
    }
    return synthesize(images.training, images.validation, images.textures, **arguments)


def altered(images: SimpleNamespace, **changes: list[Path]) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(images), **changes})


@pytest.fixture(scope="module")
def folder(images: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic set, saved."""
    target = tmp_path_factory.mktemp("synthetic_set")
    describe(images).save(target)
    return target


@pytest.fixture(scope="module")
def synthetic_set(folder: Path) -> SyntheticSet:
    return SyntheticSet.load(folder)


def test_arrays_have_the_promised_kinds_and_shapes(synthetic_set: SyntheticSet) -> None:
    assert len(synthetic_set) == 40
    assert (synthetic_set.normals.shape, synthetic_set.normals.dtype) == ((4, *SIZE, 3), np.uint8)
    assert (synthetic_set.augmented.shape, synthetic_set.augmented.dtype) == ((40, *SIZE, 3), np.uint8)
    assert (synthetic_set.masks.shape, synthetic_set.masks.dtype) == ((40, *SIZE), np.uint8)
    assert (synthetic_set.source.shape, synthetic_set.source.dtype) == ((40,), np.int64)
    assert (len(synthetic_set.validation_normals), len(synthetic_set.validation_augmented), len(synthetic_set.validation_masks)) == (2, 16, 16)


def test_arrays_stay_on_disk(synthetic_set: SyntheticSet) -> None:
    assert all(isinstance(array, np.memmap) for array in (synthetic_set.normals, synthetic_set.augmented, synthetic_set.masks))


def test_samples_differ_from_their_normal_image_inside_the_mask_only(synthetic_set: SyntheticSet) -> None:
    for part in ("", "validation_"):
        normals, augmented, masks, source = (
            getattr(synthetic_set, f"{part}{name}") for name in ("normals", "augmented", "masks", "source")
        )
        assert set(np.unique(masks)) == {0, 1}
        differs = (augmented != normals[source]).any(axis=-1)
        assert not (differs & (masks == 0)).any()
        assert differs[masks == 1].mean() > 0.9


def test_normal_images_are_the_resized_images(synthetic_set: SyntheticSet, images: SimpleNamespace) -> None:
    for array, paths in ((synthetic_set.normals, images.training), (synthetic_set.validation_normals, images.validation)):
        for normal, path in zip(array, paths, strict=True):
            np.testing.assert_array_equal(normal, resize_image(read_image(path), SIZE))


def test_description_names_the_images_and_counts_but_no_place_of_this_machine(folder: Path, synthetic_set: SyntheticSet) -> None:
    said = synthetic_set.description
    assert said["training_images"] == [f"train/{k}.png" for k in range(4)]
    assert said["validation_images"] == ["held/0.png", "held/1.png"]
    assert said["samples"] == 40
    assert said["anomalous"] == sum(bool(mask.any()) for mask in synthetic_set.masks)
    assert (said["seed"], said["threshold"], said["opacity"]) == (3, 0.5, [0.0, 0.8])
    text = (folder / "synthetic_set.json").read_text(encoding="utf-8")
    assert str(folder.parent) not in text
    assert sorted(path.stem for path in folder.iterdir()) == sorted([*said["arrays"], "synthetic_set"])


def test_description_holds_the_arrays_checksums(folder: Path, synthetic_set: SyntheticSet) -> None:
    said = {name: array["sha256"] for name, array in synthetic_set.description["arrays"].items()}
    assert said == {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.npy")}
    assert len(said) == 8


def test_synthetic_set_is_the_same_whatever_the_number_of_processes(
    images: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folders = [tmp_path / "one", tmp_path / "two"]
    for workers, target in enumerate(folders, start=1):
        target.mkdir()
        describe(images, samples=2 * LEAST_WORK, workers=workers).save(target)
        assert f"(processes: {workers})" in caplog.text
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


def test_sample_does_not_depend_on_how_many_there_are(synthetic_set: SyntheticSet, images: SimpleNamespace, tmp_path: Path) -> None:
    describe(images, samples=25).save(tmp_path)
    fewer = SyntheticSet.load(tmp_path)
    np.testing.assert_array_equal(fewer.augmented, synthetic_set.augmented[:25])
    np.testing.assert_array_equal(fewer.masks, synthetic_set.masks[:25])


def test_another_seed_gives_another_synthetic_set(synthetic_set: SyntheticSet, images: SimpleNamespace, tmp_path: Path) -> None:
    describe(images, seed=4).save(tmp_path)
    assert (SyntheticSet.load(tmp_path).masks != synthetic_set.masks).any(axis=(1, 2)).sum() > 10


def test_validation_anomalies_are_none_of_the_training(synthetic_set: SyntheticSet) -> None:
    trained = {mask.tobytes() for mask in synthetic_set.masks if mask.any()}
    held = {mask.tobytes() for mask in synthetic_set.validation_masks if mask.any()}
    assert held
    assert not trained & held


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(enabled=True, scale=0.9)])
def test_no_image_is_opened_but_those_handed_in(images: SimpleNamespace, tmp_path: Path, tiling: Tiling) -> None:
    WATCHING.set()
    try:
        describe(images, tiling=tiling).save(tmp_path)
    finally:
        WATCHING.clear()
    opened = {Path(name) for name in OPENED if Path(name).is_relative_to(images.root)}
    OPENED.clear()
    assert opened == {*images.training, *images.validation, *images.textures}
    assert not opened & set(images.test)


def test_without_validation_images_that_part_is_empty(images: SimpleNamespace, tmp_path: Path) -> None:
    synthesize(
        images.training, [], images.textures, root=images.root, image_size=SIZE, samples=3, seed=0, workers=1
    ).save(tmp_path)
    synthetic_set = SyntheticSet.load(tmp_path)
    assert synthetic_set.validation_augmented.shape == (0, *SIZE, 3)
    assert len(synthetic_set.validation_normals) == len(synthetic_set.validation_masks) == len(synthetic_set.validation_normal_index) == 0


def test_tiling_trains_on_crops_of_every_image(images: SimpleNamespace, tmp_path: Path) -> None:
    describe(images, tiling=Tiling(enabled=True), crops_per_image=5).save(tmp_path)
    synthetic_set = SyntheticSet.load(tmp_path)
    assert len(synthetic_set.normals) == 20
    for row, normal in enumerate(synthetic_set.normals):
        image = read_image(images.training[row % 4])[..., 0]
        windows = np.lib.stride_tricks.sliding_window_view(image, SIZE)
        assert (windows == normal[..., 0]).all(axis=(2, 3)).sum() == 1
    assert synthetic_set.source.max() >= 4


def test_there_are_no_more_crops_than_samples(images: SimpleNamespace) -> None:
    training, validation = describe(images, tiling=Tiling(enabled=True)).parts
    assert (training.normals, validation.normals) == (40, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_exponents": (5, 0)}, r"synthesis\.grid_exponents: 5 to 0"),
        ({"opacity": (0.8, 0.2)}, r"synthesis\.opacity"),
    ],
)
def test_range_that_ends_before_it_begins_is_refused(
    images: SimpleNamespace, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AlmrrError, match=message):
        describe(images, **changes)


@pytest.mark.parametrize(("missing", "message"), [("training", "no normal image"), ("textures", "texture")])
def test_synthetic_set_needs_images_and_textures(images: SimpleNamespace, missing: str, message: str) -> None:
    with pytest.raises(AlmrrError, match=message):
        describe(altered(images, **{missing: []}))


def test_image_cannot_be_trained_on_and_validation_at_once(images: SimpleNamespace) -> None:
    with pytest.raises(AlmrrError, match=r"train.0\.png is to be trained on and held out"):
        describe(altered(images, validation=[*images.validation, images.training[0]]))


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_image_is_named(images: SimpleNamespace, tmp_path: Path, workers: int) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    with_broken = altered(images, textures=[*images.textures, broken])
    target = tmp_path / "synthetic_set"
    target.mkdir()
    with pytest.raises(AlmrrError, match=r"broken\.png"):
        describe(with_broken, samples=2 * LEAST_WORK, workers=workers).save(target)
    assert not (target / "synthetic_set.json").exists()


def test_synthetic_set_larger_than_the_disk_is_refused_before_any_work(images: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match=r"GiB.*synthesis\.samples"):
        describe(images, samples=10**12).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["no json", "no array", "cut array", "other shape", "no such folder"])
def test_incomplete_synthetic_set_is_refused(images: SimpleNamespace, tmp_path: Path, damage: str) -> None:
    describe(images, samples=3).save(tmp_path)
    target = tmp_path
    if damage == "no json":
        (tmp_path / "synthetic_set.json").unlink()
    elif damage == "no array":
        (tmp_path / "masks.npy").unlink()
    elif damage == "cut array":
        (tmp_path / "masks.npy").write_bytes((tmp_path / "masks.npy").read_bytes()[:-100])
    elif damage == "other shape":
        np.save(tmp_path / "masks.npy", np.zeros((2, *SIZE), np.uint8))
    else:
        target = tmp_path / "elsewhere"
    with pytest.raises(AlmrrError, match="no complete synthetic set"):
        SyntheticSet.load(target)


def test_description_is_json_without_surprises(folder: Path) -> None:
    said = json.loads((folder / "synthetic_set.json").read_text(encoding="utf-8"))
    assert said == SyntheticSet.load(folder).description
