from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from kedro.io import DataCatalog, DatasetError
from kedro.pipeline import Node, Pipeline
from kedro.runner import SequentialRunner
from PIL import Image

from almrr_pipeline.common.files import staging_folder
from almrr_pipeline.datasets.manifest import Item, build_manifest
from almrr_pipeline.evaluation.maps import AnomalyMaps
from almrr_pipeline.kedro_support.datasets import (
    ArrayDataset,
    FolderDataset,
    ManifestDataset,
    StreamedPartitions,
)


def _fill(scratch: Path, text: str) -> Path:
    with staging_folder(scratch) as folder:
        (folder / "text").write_text(text)
    return folder


def _partitions(folder: Path) -> StreamedPartitions:
    return StreamedPartitions(
        path=str(folder), dataset=ArrayDataset, filename_suffix=".npy", overwrite=True
    )


def _map(value: float) -> npt.NDArray[np.float32]:
    return np.full((2, 3), value, np.float32)


def test_a_manifest_is_read_as_it_was_built_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "NA.png"
    Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12)).save(path)
    item = Item(path, None, "train", "normal", "NA")
    built = build_manifest([item], root=tmp_path, expected=None, strict=False)
    dataset = ManifestDataset(filepath=str(tmp_path / "manifest.csv"), save_args={"index": False})
    dataset.save(built)
    pd.testing.assert_frame_equal(dataset.load(), built, check_dtype=False)
    dataset.save(built.assign(image="../../etc/passwd"))
    with pytest.raises(DatasetError) as caught:
        dataset.load()
    assert str(caught.value.__cause__) == (
        f"{tmp_path}/manifest.csv, line 2: image cannot be '../../etc/passwd'; "
        "fetch the category again."
    )


def test_a_saved_folder_replaces_the_one_before(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=str(tmp_path / "deep" / "folder"))
    dataset.save(_fill(tmp_path / "scratch", "old"))
    dataset.save(_fill(tmp_path / "scratch", "new"))
    assert (dataset.load() / "text").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]
    assert not list((tmp_path / "scratch").iterdir())


def test_a_node_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=str(tmp_path / "folder"))
    dataset.save(_fill(tmp_path / "scratch", "old"))

    def fail() -> None:
        with staging_folder(tmp_path / "scratch") as folder:
            (folder / "text").write_text("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        fail()
    assert (tmp_path / "folder" / "text").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "scratch"]
    assert not list((tmp_path / "scratch").iterdir())


def test_a_failed_save_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=str(tmp_path / "folder"))
    dataset.save(_fill(tmp_path / "scratch", "old"))
    (tmp_path / "scratch").rmdir()
    with pytest.raises(FileNotFoundError, match="absent"):
        dataset.save(tmp_path / "absent")
    assert (tmp_path / "folder" / "text").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_absent_until_it_is_saved(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=str(tmp_path / "folder"))
    assert not dataset.exists()
    dataset.save(_fill(tmp_path, "here"))
    assert dataset.exists()


def test_a_folder_that_holds_a_class_is_loaded_by_it(tmp_path: Path) -> None:
    maps = [_map(value) for value in (0.25, 0.5)]
    _partitions(tmp_path / "maps").save({f"{index:06d}": one for index, one in enumerate(maps)})
    dataset = FolderDataset(
        filepath=str(tmp_path / "maps"), holds="almrr_pipeline.evaluation.maps.AnomalyMaps"
    )
    loaded = dataset.load()
    assert isinstance(loaded, AnomalyMaps)
    assert len(loaded) == 2
    np.testing.assert_array_equal(loaded[1], maps[1])


def test_an_array_is_read_as_it_was_written(tmp_path: Path) -> None:
    dataset = ArrayDataset(filepath=str(tmp_path / "deep" / "map.npy"))
    assert not dataset.exists()
    dataset.save(_map(0.1))
    assert dataset.exists()
    assert dataset.load().dtype == np.float32
    np.testing.assert_array_equal(dataset.load(), _map(0.1))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["map.npy"]


def test_the_partitions_of_a_run_add_up_and_those_of_an_earlier_run_are_gone(
    tmp_path: Path,
) -> None:
    _partitions(tmp_path / "maps").save({"0": _map(0.0), "1": _map(0.1), "2": _map(0.2)})
    second = _partitions(tmp_path / "maps")
    second.save({"0": _map(0.5)})
    second.save({"1": _map(0.6)})
    loaded = {name: float(load().max()) for name, load in second.load().items()}
    assert loaded == {"0": 0.5, "1": pytest.approx(0.6)}


def test_each_map_of_a_generator_node_is_saved_before_the_next_is_computed(tmp_path: Path) -> None:
    saved: list[list[str]] = []

    def predict() -> Iterator[dict[str, npt.NDArray[np.float32]]]:
        for index in range(3):
            saved.append(sorted(path.stem for path in tmp_path.glob("maps/*.npy")))
            yield {str(index): _map(index)}

    catalog = DataCatalog({"maps": _partitions(tmp_path / "maps")})
    SequentialRunner().run(Pipeline([Node(predict, None, "maps", name="predict")]), catalog)
    assert saved == [[], ["0"], ["0", "1"]]
    assert sorted(catalog.load("maps")) == ["0", "1", "2"]
