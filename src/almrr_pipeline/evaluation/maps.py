"""Anomaly maps and ground truth on disk, read one at a time, and the table of image scores."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import label

from almrr_pipeline.common.arrays import AnomalyMap, MaskArray
from almrr_pipeline.common.masks import (
    MaskReading,
    explain_emptiness,
    inspect_mask,
    read_mask,
    resize_mask,
)
from almrr_pipeline.common.region import Region, index_counted
from almrr_pipeline.evaluation.curves import average_precision, trace_curve

logger = logging.getLogger(__name__)

_FEW_PIXELS = 4  # a region below 2 x 2: its outline is all of it


@dataclass(frozen=True)
class AnomalyMaps:
    """Sequence of anomaly maps in .npy files, one per image, read on access; sizes may differ."""

    paths: Sequence[Path]

    @classmethod
    def load(cls, folder: Path) -> AnomalyMaps:
        """Open a folder of files 000000.npy, 000001.npy, ... in the order of their names."""
        return cls(sorted(folder.glob("*.npy")))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> AnomalyMap:
        """Read one map, float32 in [0, 1], shape (H, W)."""
        anomaly_map: AnomalyMap = np.load(self.paths[index])
        return anomaly_map

    def __iter__(self) -> Iterator[AnomalyMap]:
        return (self[index] for index in range(len(self)))

    def size(self, index: int) -> tuple[int, int]:
        """Rows and columns of a map, from the file's header alone."""
        rows, columns = np.load(self.paths[index], mmap_mode="r").shape
        return rows, columns


@dataclass(frozen=True)
class GroundTruth:
    """Sequence of masks, each resized to its anomaly map; None for an image without a mask file.

    What is outside of the region is not anomalous.
    """

    masks: Sequence[Path | None]
    maps: AnomalyMaps
    reading: MaskReading | None = None  # which values of the masks are anomalous
    region: Region | None = None  # what of the images counts

    def __len__(self) -> int:
        return len(self.masks)

    def __iter__(self) -> Iterator[MaskArray | None]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> MaskArray | None:
        """Read one mask, resized as `resize_mask` does; bool, shape (H, W)."""
        path = self.masks[index]
        if path is None:
            return None
        mask = resize_mask(read_mask(path, reading=self.reading), self.maps.size(index))
        return mask if self.region is None else mask & self.region.at(mask.shape)

    def explain_emptiness(self, chosen: Iterable[int]) -> str:
        """Why no mask of the chosen images has an anomalous pixel; resizing loses no region."""
        reading = self.reading or MaskReading()
        paths = [path for path in (self.masks[index] for index in chosen) if path is not None]
        return explain_emptiness((inspect_mask(path, reading=reading) for path in paths), reading)


def report_small_regions(truth: GroundTruth) -> tuple[int, int]:
    """Count the regions of all masks, and those of fewer than 4 pixels; logs a warning of these."""
    areas = [0]
    for mask in truth:
        if mask is not None:
            areas += np.bincount(label(mask, np.ones((3, 3)))[0].ravel())[1:].tolist()
    small = sum(0 < area < _FEW_PIXELS for area in areas)
    if small:
        logger.warning(
            "%d of %d defect regions have fewer than %d pixels at the network's size, too few to "
            "outline; enable data.tiling, or enlarge data.image_size",
            *(small, len(areas) - 1, _FEW_PIXELS),
        )
    return len(areas) - 1, small


def tabulate_scores(
    rows: pd.DataFrame,
    maps: AnomalyMaps,
    truth: GroundTruth,
    *,
    scores: Sequence[float],
    threshold: float | None,
) -> pd.DataFrame:
    """Tabulate each image's score and verdict; `rows` are the images' rows of the manifest.

    Returns:
        Columns image, label, defect_type, score, is_anomalous (empty without a threshold), and
        pixel_ap, the average precision of the image's own pixels (empty where none is known to be
        anomalous).
    """
    columns = ["image", "label", "defect_type"]
    table = rows[columns].reset_index(drop=True).assign(score=list(scores))
    table["is_anomalous"] = pd.Series([None] * len(table), dtype="boolean")
    if threshold is not None:
        table["is_anomalous"] = table["score"] > threshold
    pixel_ap = [_pixel_ap(maps, truth, index) for index in range(len(table))]
    return table.assign(pixel_ap=pd.Series(pixel_ap, dtype="float64"))


def _pixel_ap(maps: AnomalyMaps, truth: GroundTruth, index: int) -> float | None:
    mask = truth[index]
    if mask is None or not mask.any():
        return None
    counted = index_counted(mask, truth.region)
    return float(
        average_precision(trace_curve(maps[index][counted].ravel(), mask[counted].ravel()))
    )
