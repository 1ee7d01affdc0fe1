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
from almrr_pipeline.errors import AlmrrError
from almrr_pipeline.images import read_image, resize_image
from almrr_pipeline.synthesis.pool import LEAST_WORK, Pool, SimulatedPool, simulate_pool

SIZE = (48, 32)
OPENED: list[str] = []
"""Every file that this process opens while WATCHING is set."""
WATCHING = threading.Event()


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and WATCHING.is_set() and isinstance(arguments[0], str | bytes | Path):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_note_opened)


def describe(pictures: SimpleNamespace, **changes: Any) -> SimulatedPool:
    arguments: dict[str, Any] = {
        "root": pictures.root,
        "image_size": SIZE,
        "samples": 40,
        "seed": 3,
        "workers": 1,
        **changes,
    }
    return simulate_pool(pictures.training, pictures.held_out, pictures.textures, **arguments)


def altered(pictures: SimpleNamespace, **changes: list[Path]) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(pictures), **changes})


@pytest.fixture(scope="module")
def folder(pictures: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool, saved."""
    target = tmp_path_factory.mktemp("pool")
    describe(pictures).save(target)
    return target


@pytest.fixture(scope="module")
def pool(folder: Path) -> Pool:
    return Pool.load(folder)


def test_arrays_have_the_promised_kinds_and_shapes(pool: Pool) -> None:
    assert len(pool) == 40
    assert (pool.normals.shape, pool.normals.dtype) == ((4, *SIZE, 3), np.uint8)
    assert (pool.augmented.shape, pool.augmented.dtype) == ((40, *SIZE, 3), np.uint8)
    assert (pool.masks.shape, pool.masks.dtype) == ((40, *SIZE), np.uint8)
    assert (pool.source.shape, pool.source.dtype) == ((40,), np.int64)
    assert (len(pool.held_normals), len(pool.held_augmented), len(pool.held_masks)) == (2, 16, 16)


def test_arrays_stay_on_disk(pool: Pool) -> None:
    assert all(isinstance(array, np.memmap) for array in (pool.normals, pool.augmented, pool.masks))


def test_samples_differ_from_their_normal_picture_inside_the_mask_only(pool: Pool) -> None:
    for part in ("", "held_"):
        normals, augmented, masks, source = (
            getattr(pool, f"{part}{name}") for name in ("normals", "augmented", "masks", "source")
        )
        assert set(np.unique(masks)) == {0, 1}
        differs = (augmented != normals[source]).any(axis=-1)
        assert not (differs & (masks == 0)).any()
        assert differs[masks == 1].mean() > 0.9


def test_normal_pictures_are_the_resized_pictures(pool: Pool, pictures: SimpleNamespace) -> None:
    for array, paths in ((pool.normals, pictures.training), (pool.held_normals, pictures.held_out)):
        for normal, path in zip(array, paths, strict=True):
            np.testing.assert_array_equal(normal, resize_image(read_image(path), SIZE))


def test_description_names_the_pictures_and_counts_but_no_place_of_this_machine(folder: Path, pool: Pool) -> None:
    said = pool.description
    assert said["training_images"] == [f"train/{k}.png" for k in range(4)]
    assert said["held_out_images"] == ["held/0.png", "held/1.png"]
    assert said["samples"] == 40
    assert said["anomalous"] == sum(bool(mask.any()) for mask in pool.masks)
    assert (said["seed"], said["threshold"], said["opacity"]) == (3, 0.5, [0.0, 0.8])
    text = (folder / "pool.json").read_text(encoding="utf-8")
    assert str(folder.parent) not in text
    assert sorted(path.stem for path in folder.iterdir()) == sorted([*said["arrays"], "pool"])


def test_description_holds_the_arrays_checksums(folder: Path, pool: Pool) -> None:
    said = {name: array["sha256"] for name, array in pool.description["arrays"].items()}
    assert said == {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.npy")}
    assert len(said) == 8


def test_pool_is_the_same_whatever_the_number_of_processes(
    pictures: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folders = [tmp_path / "one", tmp_path / "two"]
    for workers, target in enumerate(folders, start=1):
        target.mkdir()
        describe(pictures, samples=2 * LEAST_WORK, workers=workers).save(target)
        assert f"(processes: {workers})" in caplog.text
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


def test_sample_does_not_depend_on_how_many_there_are(pool: Pool, pictures: SimpleNamespace, tmp_path: Path) -> None:
    describe(pictures, samples=25).save(tmp_path)
    fewer = Pool.load(tmp_path)
    np.testing.assert_array_equal(fewer.augmented, pool.augmented[:25])
    np.testing.assert_array_equal(fewer.masks, pool.masks[:25])


def test_another_seed_gives_another_pool(pool: Pool, pictures: SimpleNamespace, tmp_path: Path) -> None:
    describe(pictures, seed=4).save(tmp_path)
    assert (Pool.load(tmp_path).masks != pool.masks).any(axis=(1, 2)).sum() > 10


def test_held_out_anomalies_are_none_of_the_training(pool: Pool) -> None:
    trained = {mask.tobytes() for mask in pool.masks if mask.any()}
    held = {mask.tobytes() for mask in pool.held_masks if mask.any()}
    assert held
    assert not trained & held


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(enabled=True, scale=0.9)])
def test_no_picture_is_opened_but_those_handed_in(pictures: SimpleNamespace, tmp_path: Path, tiling: Tiling) -> None:
    WATCHING.set()
    try:
        describe(pictures, tiling=tiling).save(tmp_path)
    finally:
        WATCHING.clear()
    opened = {Path(name) for name in OPENED if Path(name).is_relative_to(pictures.root)}
    OPENED.clear()
    assert opened == {*pictures.training, *pictures.held_out, *pictures.textures}
    assert not opened & set(pictures.test)


def test_without_held_out_pictures_that_part_is_empty(pictures: SimpleNamespace, tmp_path: Path) -> None:
    simulate_pool(
        pictures.training, [], pictures.textures, root=pictures.root, image_size=SIZE, samples=3, seed=0, workers=1
    ).save(tmp_path)
    pool = Pool.load(tmp_path)
    assert pool.held_augmented.shape == (0, *SIZE, 3)
    assert len(pool.held_normals) == len(pool.held_masks) == len(pool.held_source) == 0


def test_tiling_trains_on_crops_of_every_picture(pictures: SimpleNamespace, tmp_path: Path) -> None:
    describe(pictures, tiling=Tiling(enabled=True), crops_per_picture=5).save(tmp_path)
    pool = Pool.load(tmp_path)
    assert len(pool.normals) == 20
    for row, normal in enumerate(pool.normals):
        picture = read_image(pictures.training[row % 4])[..., 0]
        windows = np.lib.stride_tricks.sliding_window_view(picture, SIZE)
        assert (windows == normal[..., 0]).all(axis=(2, 3)).sum() == 1
    assert pool.source.max() >= 4


def test_there_are_no_more_crops_than_samples(pictures: SimpleNamespace) -> None:
    training, held_out = describe(pictures, tiling=Tiling(enabled=True)).parts
    assert (training.normals, held_out.normals) == (40, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_exponents": (5, 0)}, r"synthesis\.grid_exponents: 5 to 0"),
        ({"opacity": (0.8, 0.2)}, r"synthesis\.opacity"),
    ],
)
def test_range_that_ends_before_it_begins_is_refused(
    pictures: SimpleNamespace, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AlmrrError, match=message):
        describe(pictures, **changes)


@pytest.mark.parametrize(("missing", "message"), [("training", "no normal picture"), ("textures", "anomaly source")])
def test_pool_needs_pictures_and_anomaly_sources(pictures: SimpleNamespace, missing: str, message: str) -> None:
    with pytest.raises(AlmrrError, match=message):
        describe(altered(pictures, **{missing: []}))


def test_picture_cannot_be_trained_on_and_held_out_at_once(pictures: SimpleNamespace) -> None:
    with pytest.raises(AlmrrError, match=r"train.0\.png is to be trained on and held out"):
        describe(altered(pictures, held_out=[*pictures.held_out, pictures.training[0]]))


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_picture_is_named(pictures: SimpleNamespace, tmp_path: Path, workers: int) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    with_broken = altered(pictures, textures=[*pictures.textures, broken])
    target = tmp_path / "pool"
    target.mkdir()
    with pytest.raises(AlmrrError, match=r"broken\.png"):
        describe(with_broken, samples=2 * LEAST_WORK, workers=workers).save(target)
    assert not (target / "pool.json").exists()


def test_pool_larger_than_the_disk_is_refused_before_any_work(pictures: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match=r"GiB.*synthesis\.samples"):
        describe(pictures, samples=10**12).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["no json", "no array", "cut array", "other shape", "no such folder"])
def test_incomplete_pool_is_refused(pictures: SimpleNamespace, tmp_path: Path, damage: str) -> None:
    describe(pictures, samples=3).save(tmp_path)
    target = tmp_path
    if damage == "no json":
        (tmp_path / "pool.json").unlink()
    elif damage == "no array":
        (tmp_path / "masks.npy").unlink()
    elif damage == "cut array":
        (tmp_path / "masks.npy").write_bytes((tmp_path / "masks.npy").read_bytes()[:-100])
    elif damage == "other shape":
        np.save(tmp_path / "masks.npy", np.zeros((2, *SIZE), np.uint8))
    else:
        target = tmp_path / "elsewhere"
    with pytest.raises(AlmrrError, match="no complete pool"):
        Pool.load(target)


def test_description_is_json_without_surprises(folder: Path) -> None:
    said = json.loads((folder / "pool.json").read_text(encoding="utf-8"))
    assert said == Pool.load(folder).description
