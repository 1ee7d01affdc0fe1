"""Anomaly maps on disk and the ground truth beside them, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from almrr_pipeline.evaluation.curves import average_precision, trace_curve
from almrr_pipeline.common.images import MaskArray, read_mask, resize_mask

AnomalyMap = npt.NDArray[np.float32]
"""Probability of a defect per pixel, float32 in [0, 1], shape (H, W)."""


class AnomalyMaps:
    """The maps of a list of images, in its order: one .npy file each, since sizes may differ."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Take the files as they are; each is read when it is asked for."""
        self._paths = list(paths)

    @classmethod
    def load(cls, folder: Path) -> AnomalyMaps:
        """Open a folder that a function of `writer` has filled."""
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

    def __getitem__(self, index: int) -> AnomalyMap:
        """Read one map, float32 in [0, 1], shape (H, W)."""
        anomaly_map: AnomalyMap = np.load(self._paths[index])
        return anomaly_map

    def __iter__(self) -> Iterator[AnomalyMap]:
        """Read one map after the other."""
        return (self[index] for index in range(len(self)))

    def size(self, index: int) -> tuple[int, int]:
        """Rows and columns of a map, from the file's head alone."""
        rows, columns = np.load(self._paths[index], mmap_mode="r").shape
        return rows, columns


class GroundTruth:
    """The masks of a list of images, each at the size of its anomaly map; None where an image has no mask."""

    def __init__(self, masks: Sequence[Path | None], maps: AnomalyMaps) -> None:
        """Pair masks with maps.

        Args:
            masks: one path per image; None for a normal image, or where the ground truth is not known.
            maps: the anomaly maps of the same images, for their sizes.
        """
        self._masks = list(masks)
        self._maps = maps

    def __len__(self) -> int:
        """Number of images."""
        return len(self._masks)

    def __getitem__(self, index: int) -> MaskArray | None:
        """Read one mask, resized with the nearest neighbor; bool, shape (H, W)."""
        path = self._masks[index]
        return None if path is None else resize_mask(read_mask(path), self._maps.size(index))


def tabulate_scores(
    rows: pd.DataFrame, maps: AnomalyMaps, truth: GroundTruth, *, scores: Sequence[float], threshold: float | None
) -> pd.DataFrame:
    """List each image's score and verdict.

    Args:
        rows: the manifest's rows of the images: image, label, defect.
        maps: their anomaly maps.
        truth: their masks.
        scores: their image scores.
        threshold: the score above which an image is called anomalous; None leaves the verdict empty.

    Returns:
        image, label, defect, score, is_anomalous, and pixel_ap: the average precision of the image's own pixels,
        empty where no pixel is known to be defective.
    """
    table = rows[["image", "label", "defect"]].reset_index(drop=True).assign(score=list(scores))
    verdicts = pd.Series([None] * len(table), dtype="boolean") if threshold is None else table["score"] > threshold
    localized = pd.Series([_pixel_ap(maps, truth, index) for index in range(len(table))], dtype="float64")
    return table.assign(is_anomalous=verdicts, pixel_ap=localized)


def _pixel_ap(maps: AnomalyMaps, truth: GroundTruth, index: int) -> float | None:
    mask = truth[index]
    if mask is None or not mask.any():
        return None
    return float(average_precision(trace_curve(maps[index].ravel(), mask.ravel())))
