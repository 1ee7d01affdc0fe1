"""A Kedro dataset for things that fill a folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset
from kedro.utils import load_obj

FillsFolder = Callable[[Path], object]
"""Writes whatever it stands for into an existing, empty folder."""


class FolderDataset(AbstractDataset[FillsFolder, Any]):
    """A folder that is complete or absent.

    What is saved is a function that fills an empty folder: it is given one beside the final place, which is renamed
    when the function has returned and removed when it has failed. Loading returns the folder's path or, where `holds`
    names a class, what that class's `load(folder)` returns.
    """

    def __init__(self, *, filepath: str, holds: str | None = None, metadata: dict[str, Any] | None = None) -> None:
        """Describe the folder.

        Args:
            filepath: the folder; Kedro takes relative paths from the project's root.
            holds: dotted name of a class with a method `load(folder: Path)`.
            metadata: for Kedro-Viz and other tools; not used here.
        """
        self._folder = Path(filepath)
        self._holds = holds
        self.metadata = metadata

    def load(self) -> Any:  # noqa: ANN401  whatever the class that `holds` names returns
        """Return the folder's path, or the object it holds."""
        return load_obj(self._holds).load(self._folder) if self._holds else self._folder

    def save(self, data: FillsFolder) -> None:
        """Fill a folder beside the final one, then put it in its place."""
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        for killed in self._folder.parent.glob(f".{self._folder.name}.????????"):
            shutil.rmtree(killed)  # what a process left that had no time to clean up
        beside = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}.", dir=self._folder.parent))
        try:
            beside.chmod(0o755)  # mkdtemp's 0o700 would lock colleagues out of a shared disk
            data(beside)
            if self._folder.exists():
                shutil.rmtree(self._folder)
            beside.rename(self._folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _exists(self) -> bool:
        return self._folder.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._folder.as_posix(), "holds": self._holds}
