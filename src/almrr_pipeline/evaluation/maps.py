"""Anomaly maps on disk and the ground truth beside them, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from almrr_pipeline.images import MaskArray, read_mask, resize_mask

AnomalyMap = npt.NDArray[np.float32]
"""Probability of a defect per pixel, float32 in [0, 1], shape (H, W)."""


class AnomalyMaps(Sequence[AnomalyMap]):
    """The maps of a list of pictures, in its order: one .npy file each, since sizes may differ."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Take the files as they are; each is read when it is asked for."""
        self._paths = list(paths)

    @classmethod
    def load(cls, folder: Path) -> AnomalyMaps:
        """Open a folder that `writer` has filled."""
        return cls(sorted(folder.glob("*.npy")))

    @staticmethod
    def writer(maps: Iterable[AnomalyMap]) -> Callable[[Path], None]:
        """A function that fills a folder with the maps as they come, one in memory at a time."""

        def fill(folder: Path) -> None:
            for index, anomaly_map in enumerate(maps):
                np.save(folder / f"{index:06d}.npy", anomaly_map.astype(np.float32, copy=False))

        return fill

    def __len__(self) -> int:
        """Number of maps."""
        return len(self._paths)

    def __getitem__(self, index: int) -> AnomalyMap:  # type: ignore[override]  # slices are not needed
        """Read one map."""
        return np.load(self._paths[index])


class GroundTruth(Sequence[MaskArray]):
    """The masks of a list of pictures, each at the size of its anomaly map; normal pictures have empty ones."""

    def __init__(self, masks: Sequence[Path | None], maps: Sequence[AnomalyMap]) -> None:
        """Pair masks with maps.

        Args:
            masks: one path per picture, None for a normal picture.
            maps: the anomaly maps of the same pictures, for their sizes.
        """
        self._masks = list(masks)
        self._maps = maps

    def __len__(self) -> int:
        """Number of masks."""
        return len(self._masks)

    def __getitem__(self, index: int) -> MaskArray:  # type: ignore[override]  # slices are not needed
        """Read one mask, resized with the nearest neighbour."""
        size = self._maps[index].shape
        path = self._masks[index]
        return np.zeros(size, dtype=bool) if path is None else resize_mask(read_mask(path), (size[0], size[1]))
