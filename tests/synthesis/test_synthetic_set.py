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

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import read_image, resize_image
from almrr_pipeline.config import SynthesisSettings, Tiling
from almrr_pipeline.synthesis.synthetic_set import (
    CROPS_PER_IMAGE,
    LEAST_WORK,
    ImagePaths,
    SyntheticSet,
    synthesize,
)

SIZE = (48, 32)
OPENED: list[str] = []
"""Every file that this process opens while WATCHING is set."""
WATCHING = threading.Event()


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and WATCHING.is_set() and isinstance(arguments[0], str | bytes | Path):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_note_opened)


def make(
    images: SimpleNamespace,
    folder: Path,
    *,
    seed: int = 3,
    tiling: Tiling | None = None,
    **settings: Any,
) -> SyntheticSet:
    """Synthesize a set from the images, 40 samples if nothing else is requested, and open it."""
    synthesize(
        ImagePaths(images.root, images.training, images.validation, images.textures),
        SynthesisSettings(**{"samples": 40, "workers": 1} | settings),
        folder=folder,
        image_size=SIZE,
        tiling=tiling or Tiling(),
        seed=seed,
    )
    return SyntheticSet.load(folder)


def altered(images: SimpleNamespace, **changes: list[Path]) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(images), **changes})


@pytest.fixture(scope="module")
def folder(images: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic set, saved."""
    target = tmp_path_factory.mktemp("synthetic_set")
    make(images, target)
    return target


@pytest.fixture(scope="module")
def synthetic_set(folder: Path) -> SyntheticSet:
    return SyntheticSet.load(folder)


def test_arrays_have_the_documented_types_and_shapes(synthetic_set: SyntheticSet) -> None:
    assert len(synthetic_set) == 40
    assert (synthetic_set.normals.shape, synthetic_set.normals.dtype) == ((4, *SIZE, 3), np.uint8)
    assert (synthetic_set.augmented.shape, synthetic_set.augmented.dtype) == (
        (40, *SIZE, 3),
        np.uint8,
    )
    assert (synthetic_set.masks.shape, synthetic_set.masks.dtype) == ((40, *SIZE), np.uint8)
    assert (synthetic_set.normal_index.shape, synthetic_set.normal_index.dtype) == ((40,), np.int64)
    assert (
        len(synthetic_set.validation_normals),
        len(synthetic_set.validation_augmented),
        len(synthetic_set.validation_masks),
    ) == (2, 16, 16)


def test_arrays_stay_on_disk(synthetic_set: SyntheticSet) -> None:
    assert all(
        isinstance(array, np.memmap)
        for array in (synthetic_set.normals, synthetic_set.augmented, synthetic_set.masks)
    )


def test_samples_differ_from_their_normal_image_inside_the_mask_only(
    synthetic_set: SyntheticSet,
) -> None:
    for prefix in ("", "validation_"):
        normals, augmented, masks, normal_index = (
            getattr(synthetic_set, f"{prefix}{name}")
            for name in ("normals", "augmented", "masks", "normal_index")
        )
        assert set(np.unique(masks)) == {0, 1}
        differs = (augmented != normals[normal_index]).any(axis=-1)
        assert not (differs & (masks == 0)).any()
        assert differs[masks == 1].mean() > 0.9


def test_normal_images_are_the_resized_images(
    synthetic_set: SyntheticSet, images: SimpleNamespace
) -> None:
    for array, paths in (
        (synthetic_set.normals, images.training),
        (synthetic_set.validation_normals, images.validation),
    ):
        for normal, path in zip(array, paths, strict=True):
            np.testing.assert_array_equal(normal, resize_image(read_image(path), SIZE))


def test_description_names_images_and_counts_but_no_folder_of_this_machine(
    folder: Path, synthetic_set: SyntheticSet
) -> None:
    description = synthetic_set.description
    assert description["training_images"] == [f"train/{k}.png" for k in range(4)]
    assert description["validation_images"] == ["validation/0.png", "validation/1.png"]
    assert description["samples"] == 40
    assert description["anomalous"] == sum(bool(mask.any()) for mask in synthetic_set.masks)
    assert (description["seed"], description["threshold"], description["opacity"]) == (
        3,
        0.5,
        [0.0, 0.8],
    )
    text = (folder / "synthetic_set.json").read_text(encoding="utf-8")
    assert str(folder.parent) not in text
    assert sorted(path.stem for path in folder.iterdir()) == sorted(
        [*description["arrays"], "synthetic_set"]
    )


def test_description_holds_the_arrays_checksums(folder: Path, synthetic_set: SyntheticSet) -> None:
    written = {name: array["sha256"] for name, array in synthetic_set.description["arrays"].items()}
    assert written == {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.npy")
    }
    assert len(written) == 8


def test_synthetic_set_is_the_same_whatever_the_number_of_processes(
    images: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folders = [tmp_path / "one", tmp_path / "two"]
    for workers, target in enumerate(folders, start=1):
        target.mkdir()
        make(images, target, samples=2 * LEAST_WORK, workers=workers)
        assert f"(processes: {workers})" in caplog.text
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


def test_sample_does_not_depend_on_how_many_there_are(
    synthetic_set: SyntheticSet, images: SimpleNamespace, tmp_path: Path
) -> None:
    fewer = make(images, tmp_path, samples=25)
    np.testing.assert_array_equal(fewer.augmented, synthetic_set.augmented[:25])
    np.testing.assert_array_equal(fewer.masks, synthetic_set.masks[:25])


def test_another_seed_gives_another_synthetic_set(
    synthetic_set: SyntheticSet, images: SimpleNamespace, tmp_path: Path
) -> None:
    other = make(images, tmp_path, seed=4)
    assert (other.masks != synthetic_set.masks).any(axis=(1, 2)).sum() > 10


def test_validation_anomalies_differ_from_those_of_the_training(
    synthetic_set: SyntheticSet,
) -> None:
    trained = {mask.tobytes() for mask in synthetic_set.masks if mask.any()}
    validation = {mask.tobytes() for mask in synthetic_set.validation_masks if mask.any()}
    assert validation
    assert not trained & validation


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(enabled=True, scale=0.9)])
def test_no_image_is_opened_but_those_passed_in(
    images: SimpleNamespace, tmp_path: Path, tiling: Tiling
) -> None:
    WATCHING.set()
    try:
        make(images, tmp_path, tiling=tiling)
    finally:
        WATCHING.clear()
    opened = {Path(name) for name in OPENED if Path(name).is_relative_to(images.root)}
    OPENED.clear()
    assert opened == {*images.training, *images.validation, *images.textures}
    assert not opened & set(images.test)


def test_without_validation_images_that_split_is_empty(
    images: SimpleNamespace, tmp_path: Path
) -> None:
    synthetic_set = make(altered(images, validation=[]), tmp_path, samples=3)
    assert synthetic_set.validation_augmented.shape == (0, *SIZE, 3)
    assert (
        len(synthetic_set.validation_normals)
        == len(synthetic_set.validation_masks)
        == len(synthetic_set.validation_normal_index)
        == 0
    )


def test_tiling_trains_on_crops_of_every_image(images: SimpleNamespace, tmp_path: Path) -> None:
    synthetic_set = make(images, tmp_path, tiling=Tiling(enabled=True), samples=20)
    assert len(synthetic_set.normals) == 20
    for row, normal in enumerate(synthetic_set.normals):
        image = read_image(images.training[row % 4])[..., 0]
        windows = np.lib.stride_tricks.sliding_window_view(image, SIZE)
        assert (windows == normal[..., 0]).all(axis=(2, 3)).sum() == 1
    assert synthetic_set.normal_index.max() >= 4


def test_there_are_no_more_crops_than_samples(images: SimpleNamespace, tmp_path: Path) -> None:
    synthetic_set = make(images, tmp_path, tiling=Tiling(enabled=True))
    assert len(synthetic_set.normals) == 40
    assert len(synthetic_set.validation_normals) == len(synthetic_set.validation_masks) == 16


def test_an_image_gives_a_limited_number_of_crops(images: SimpleNamespace, tmp_path: Path) -> None:
    one = altered(images, training=images.training[:1])
    synthetic_set = make(one, tmp_path, tiling=Tiling(enabled=True), samples=CROPS_PER_IMAGE + 9)
    assert len(synthetic_set.normals) == CROPS_PER_IMAGE


@pytest.mark.parametrize(
    ("missing", "message"), [("training", "no normal image"), ("textures", "texture")]
)
def test_synthetic_set_needs_images_and_textures(
    images: SimpleNamespace, tmp_path: Path, missing: str, message: str
) -> None:
    with pytest.raises(AlmrrError, match=message):
        make(altered(images, **{missing: []}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_image_in_both_splits_is_refused(images: SimpleNamespace, tmp_path: Path) -> None:
    both = altered(images, validation=[*images.validation, images.training[0]])
    with pytest.raises(AlmrrError, match=r"train.0\.png is both a training and a validation image"):
        make(both, tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_image_is_named(images: SimpleNamespace, tmp_path: Path, workers: int) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    with_broken = altered(images, textures=[*images.textures, broken])
    target = tmp_path / "synthetic_set"
    target.mkdir()
    with pytest.raises(AlmrrError, match=r"broken\.png"):
        make(with_broken, target, samples=2 * LEAST_WORK, workers=workers)
    assert not (target / "synthetic_set.json").exists()


def test_synthetic_set_larger_than_the_disk_is_refused_before_any_work(
    images: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(AlmrrError, match=r"GiB.*synthesis\.samples"):
        make(images, tmp_path, samples=10**12)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", ["no json", "no array", "cut array", "other shape", "flipped bit", "no such folder"]
)
def test_incomplete_synthetic_set_is_refused(
    images: SimpleNamespace, tmp_path: Path, damage: str
) -> None:
    make(images, tmp_path, samples=3)
    target = tmp_path
    if damage == "no json":
        (tmp_path / "synthetic_set.json").unlink()
    elif damage == "no array":
        (tmp_path / "masks.npy").unlink()
    elif damage == "cut array":
        (tmp_path / "masks.npy").write_bytes((tmp_path / "masks.npy").read_bytes()[:-100])
    elif damage == "other shape":
        np.save(tmp_path / "masks.npy", np.zeros((2, *SIZE), np.uint8))
    elif damage == "flipped bit":
        content = bytearray((tmp_path / "masks.npy").read_bytes())
        content[-1] ^= 1
        (tmp_path / "masks.npy").write_bytes(content)
    else:
        target = tmp_path / "elsewhere"
    with pytest.raises(AlmrrError, match="has no complete synthetic set"):
        SyntheticSet.load(target)


def test_description_is_read_back_as_it_was_written(folder: Path) -> None:
    written = json.loads((folder / "synthetic_set.json").read_text(encoding="utf-8"))
    assert written == SyntheticSet.load(folder).description
