"""Kedro datasets for folders that a node has filled and arrays that a generator node yields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from kedro.io import AbstractDataset
from kedro.utils import load_obj
from kedro_datasets.pandas import CSVDataset  # type: ignore[import-untyped]
from kedro_datasets.partitions import PartitionedDataset  # type: ignore[import-untyped]

from almrr_pipeline.common.files import move_folder_into_place, write_atomically
from almrr_pipeline.datasets.manifest import read_manifest

Array = npt.NDArray[Any]


class FolderDataset(AbstractDataset[Path, Any]):
    """A folder that is complete or absent.

    A node fills a staging folder and returns its path; saving moves that folder into place, which
    replaces the one of an earlier run. Loading returns the path or, where `holds` names a class,
    what that class's `load(folder)` returns.

    Args:
        filepath: the folder; Kedro takes relative paths from the project's root.
        holds: dotted name of a class with a method `load(folder: Path)`.
        metadata: for Kedro-Viz and other tools; not used here.
    """

    def __init__(
        self, *, filepath: str, holds: str | None = None, metadata: dict[str, Any] | None = None
    ) -> None:
        self._path, self._holds, self.metadata = Path(filepath), holds, metadata

    def load(self) -> Any:  # noqa: ANN401  whatever the class that `holds` names returns
        """Return the folder's path, or the object it holds."""
        return load_obj(self._holds).load(self._path) if self._holds else self._path

    def save(self, data: Path) -> None:
        """Move a finished folder into place."""
        move_folder_into_place(data, self._path)

    def _exists(self) -> bool:
        return self._path.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._path.as_posix(), "holds": self._holds}


class ManifestDataset(CSVDataset):  # type: ignore[misc]  # kedro-datasets is not typed
    """A category's manifest.csv, whose values are checked when it is loaded."""

    def load(self) -> pd.DataFrame:
        """Read the table; AlmrrError if it is no manifest."""
        return read_manifest(Path(self._filepath))


class ArrayDataset(AbstractDataset[Array, Array]):
    """A numpy array in an .npy file, memory-mapped when it is loaded."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(filepath)
        self.metadata = metadata  # for tools such as Kedro-Viz

    def load(self) -> Array:
        """Open the array for reading."""
        array: Array = np.load(self._path, mmap_mode="r")
        return array

    def save(self, data: Array) -> None:
        """Write the array."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self._path) as partial, partial.open("wb") as file:
            np.save(file, data)

    def _exists(self) -> bool:
        return self._path.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._path.as_posix()}


class StreamedPartitions(PartitionedDataset):  # type: ignore[misc]  # kedro-datasets is not typed
    """Kedro's partitioned dataset for a generator node, saved as it yields.

    With `overwrite`, Kedro's own removes all partitions at each save: only a generator's last would
    remain. Here the first save of a run removes those of earlier runs, and further ones add to it.
    """

    def save(self, data: dict[str, Any]) -> None:
        """Save one or several partitions."""
        super().save(data)
        self._overwrite = False
