from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kedro.io import DatasetError

from almrr_pipeline.evaluation.maps import AnomalyMaps
from almrr_pipeline.kedro_support.datasets import FolderDataset


def _write(text: str, folder: Path) -> None:
    (folder / "text").write_text(text)


def test_a_saved_folder_replaces_the_one_before(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=str(tmp_path / "deep" / "folder"))
    dataset.save(lambda folder: _write("old", folder))
    dataset.save(lambda folder: _write("new", folder))
    assert (dataset.load() / "text").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


def test_a_failed_save_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=str(tmp_path / "folder"))
    dataset.save(lambda folder: _write("old", folder))

    def fail(folder: Path) -> None:
        _write("half", folder)
        raise RuntimeError("the disk is full")

    with pytest.raises(DatasetError, match="the disk is full"):
        dataset.save(fail)
    assert (tmp_path / "folder" / "text").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_absent_until_it_is_saved(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=str(tmp_path / "folder"))
    assert not dataset.exists()
    dataset.save(lambda folder: _write("here", folder))
    assert dataset.exists()


def test_a_folder_that_holds_a_class_is_loaded_by_it(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=str(tmp_path / "maps"), holds="almrr_pipeline.evaluation.maps.AnomalyMaps")
    maps = [np.full((2, 3), value, np.float32) for value in (0.25, 0.5)]
    dataset.save(AnomalyMaps.writer(iter(maps)))
    loaded = dataset.load()
    assert len(loaded) == 2
    np.testing.assert_array_equal(loaded[1], maps[1])
