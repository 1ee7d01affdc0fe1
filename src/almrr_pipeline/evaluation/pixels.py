"""Exact counts of the pixels of many anomaly maps, without holding the maps in memory.

scikit-learn needs the scores and labels of all pixels in one array, and copies them several times:
65 bytes per pixel for AUROC and average precision (benchmarks/metrics.py). A machine with 16 GiB
ends at 250 maps of 1024 x 1024; a test set of MVTec's size, 117 such maps, takes 7 GiB.

Here maps are read one at a time: those of defective images twice, the others once. The first pass
keeps the anomalous pixels, which are few. The second pass counts, at each of their distinct scores,
the normal pixels that reach it. Memory grows with the anomalous pixels, about 150 bytes each at the
peak, and with the images, 16 KiB each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from almrr_pipeline.common.arrays import AnomalyMap, Bools, Floats, Indices, MaskArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.region import Region, index_counted
from almrr_pipeline.evaluation.curves import Curve
from almrr_pipeline.evaluation.reliability import Reliability

T_co = TypeVar("T_co", covariant=True)
Scores = npt.NDArray[np.float32]

_EIGHT_NEIGHBORS = np.ones((3, 3), dtype=np.int64)
_EDGES = 2048
"""Thresholds at which each image's pixels are counted for resampling; 16 KiB per image."""


class Indexed(Protocol[T_co]):
    """Sequence whose items may be read from disk on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


@dataclass(frozen=True)
class LabeledMaps:
    """Anomaly maps with their ground truth, read and checked one image at a time.

    A mask that is None: nothing of a normal image is anomalous, the truth of a defective one is
    unknown. If `masks` is None, all are.
    """

    maps: Indexed[AnomalyMap]  # float (H, W) each, finite; sizes may differ from image to image
    masks: Indexed[MaskArray | None] | None  # bool (H, W) each, True where anomalous
    labels: Bools  # True where the image is defective, shape (n,)
    region: Region | None = None  # what of the images counts; no mask marks anything outside

    def read(self, index: int) -> tuple[AnomalyMap, MaskArray | None]:
        """Anomaly map and mask, if any, of one image; AlmrrError if they are not as above."""
        values = np.asarray(self.maps[index], dtype=np.float32)
        name = f"The anomaly map of test image {index}"
        if values.ndim != 2 or values.size == 0:
            raise AlmrrError(f"{name} has the shape {values.shape}; it must be (rows, columns).")
        if not np.isfinite(values).all():
            raise AlmrrError(
                f"{name} has values that are not finite; the model's weights are broken, "
                "train again."
            )
        mask = None if self.masks is None else self.masks[index]
        if mask is None:
            return values, None
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != values.shape:
            raise AlmrrError(
                f"Test image {index}: the anomaly map is {values.shape} and the mask {mask.shape}; "
                "resize the mask to the map."
            )
        if mask.any() and not self.labels[index]:
            raise AlmrrError(
                f"Test image {index} is labeled normal, but its mask has anomalous pixels; "
                "correct one of them."
            )
        return values, mask


@dataclass(frozen=True)
class AnomalousPixels:
    """All P anomalous pixels of the test set, by falling score, in R regions."""

    score: Scores  # shape (P,)
    region: npt.NDArray[np.uint32]  # index of each pixel's region, shape (P,)
    area: Indices  # pixels of each region, shape (R,)
    image: Indices  # index of each region's image, shape (R,)

    @cached_property
    def weight(self) -> Floats:
        """What each pixel adds to the found fraction of its region: 1 / area, shape (P,)."""
        return 1.0 / self.area[self.region]

    def of_images(self, chosen: Bools) -> AnomalousPixels:
        """Pixels of the images that are True in `chosen`; regions keep their numbers."""
        kept = chosen[self.image]
        pixels = kept[self.region]
        area = np.where(kept, self.area, 0)
        return AnomalousPixels(self.score[pixels], self.region[pixels], area, self.image)

    def last_of_score(self) -> npt.NDArray[np.intp]:
        """Position of the last pixel of each distinct score, by falling score, shape (K,)."""
        return np.flatnonzero(np.append(self.score[1:] != self.score[:-1], self.score.size > 0))


def label_regions(mask: MaskArray) -> tuple[npt.NDArray[np.int32], int]:
    """8-connected anomalous regions of a mask: int32 (H, W), 0 where normal, 1 to n; and n."""
    labeled = np.zeros(mask.shape, dtype=np.int32)
    count = int(scipy.ndimage.label(mask, structure=_EIGHT_NEIGHBORS, output=labeled))
    return labeled, count


def gather_anomalous(
    images: LabeledMaps, reliability: Reliability | None = None
) -> tuple[AnomalousPixels, Bools]:
    """Anomalous pixels of all images, and where the ground truth is known, bool (n,).

    Maps of defective images are added to `reliability`, if it is given.
    """
    known, count = ~images.labels, 0
    scores, regions = [np.zeros(0, np.float32)], [np.zeros(0, np.uint32)]
    areas, indices = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for index in map(int, np.flatnonzero(images.labels)):
        values, mask = images.read(index)
        if mask is not None:
            known[index] = True
            if reliability is not None:
                counted = index_counted(values, images.region)
                reliability.add(values[counted], mask[counted])
            labeled, found = label_regions(mask)
            inside = labeled[mask] - 1
            scores.append(values[mask])
            regions.append((inside + count).astype(np.uint32))
            areas.append(np.bincount(inside, minlength=found))
            indices.append(np.full(found, index, dtype=np.int64))
            count += found
    score, region = np.concatenate(scores), np.concatenate(regions)
    order = np.lexsort((region, score))[::-1]
    area, image = np.concatenate(areas), np.concatenate(indices)
    return AnomalousPixels(score[order], region[order], area, image), known


def count_reaching(thresholds: Scores, runs: Iterable[Scores]) -> Indices:
    """Count the values of many arrays at strictly falling thresholds, shape (K,), exactly.

    Counts have the shape (2, K + 1): values that reach each threshold, values above it; and last
    the number of all values, twice.
    """
    rising = np.append(np.float32(-np.inf), thresholds[::-1])
    highest, tied = np.zeros((2, len(rising)), np.int64)
    for values in runs:
        index = np.searchsorted(rising, values, side="right") - 1  # highest threshold reached
        highest += np.bincount(index, minlength=len(rising))
        tied += np.bincount(index[rising[index] == values], minlength=len(rising))
    reaching = np.cumsum(highest[::-1])
    return np.stack([reaching, reaching - tied[::-1]])


@dataclass
class ImageCounts:
    """Counts of n images at E falling thresholds (edges), for resampling."""

    edge: Scores  # shape (E,)
    normal: npt.NDArray[np.uint32]  # normal pixels that reach the edge, shape (n, E)
    normals: Floats  # normal pixels, shape (n,)
    peak: Floats  # maximum of the anomaly map, shape (n,)

    @classmethod
    def empty(cls, edge: Scores, images: int) -> ImageCounts:
        """Counts of 0."""
        normal = np.zeros((images, len(edge)), np.uint32)
        return cls(edge, normal, np.zeros(images), np.zeros(images))


def choose_edges(anomalous: AnomalousPixels, threshold: float | None) -> Scores:
    """Thresholds for per-image counts: scores of anomalous pixels, and the values just above them.

    At most 2048 distinct scores are all taken, and counts at the edges lose nothing. Of more, half
    is taken evenly by pixels and half by overlap: a step between edges holds at most 1/1023 of the
    anomalous pixels and of the overlap, unless more are tied.

    They fall strictly, shape (E,), E at most 4097; `just_above(threshold)` is one of them.
    """
    chosen = last = anomalous.last_of_score()
    if len(last) > _EDGES:
        overlap = np.cumsum(anomalous.weight)[last]
        by_pixels = np.searchsorted(last, np.linspace(last[0], last[-1], _EDGES // 2))
        by_overlap = np.searchsorted(overlap, np.linspace(overlap[0], overlap[-1], _EDGES // 2))
        chosen = last[np.union1d(by_pixels, by_overlap)]
    score = anomalous.score[chosen]
    decision = np.array([] if threshold is None else [just_above(threshold)], np.float32)
    edges = np.concatenate([score, np.nextafter(score, np.float32(np.inf)), decision])
    return np.ascontiguousarray(np.unique(edges)[::-1])


def just_above(threshold: float) -> np.float32:
    """Smallest float32 above a threshold, so that `score > threshold` is `score >= just_above`."""
    nearest = np.float32(threshold)
    return nearest if float(nearest) > threshold else np.nextafter(nearest, np.float32(np.inf))


def count_normal(
    images: LabeledMaps,
    chosen: Bools,
    thresholds: Scores,
    counts: ImageCounts,
    reliability: Reliability | None = None,
) -> Indices:
    """Count the normal pixels of the images that are True in `chosen`, as `count_reaching` does.

    Each image's own counts are written to `counts` on the way; normal images are added to
    `reliability`, if it is given.
    """

    def sorted_normals() -> Iterator[Scores]:
        for index in map(int, np.flatnonzero(chosen)):
            values, mask = images.read(index)
            counted = index_counted(values, images.region)
            values = values[counted]
            if reliability is not None:
                reliability.add(values, None)
            rising = np.sort(values if mask is None else values[~mask[counted]], axis=None)
            counts.peak[index] = values.max()
            counts.normals[index] = len(rising)
            counts.normal[index] = len(rising) - np.searchsorted(rising, counts.edge)
            yield rising

    return count_reaching(thresholds, sorted_normals())


def trace_pixels(anomalous: AnomalousPixels, thresholds: Scores, normal: Indices) -> Curve:
    """Build the curve of anomalous pixels, all or some, against normal pixels.

    The normal pixels are counted at falling thresholds, of which every anomalous score is one.
    """
    last = anomalous.last_of_score()
    score = anomalous.score[last]
    at = len(thresholds) - 1 - np.searchsorted(thresholds[::-1], score)
    regions = int(np.count_nonzero(anomalous.area))
    return Curve(
        threshold=score,
        tp=last + 1,
        fp=normal[0, at],
        fp_above=normal[1, at],
        positives=np.asarray(len(anomalous.score)),
        negatives=normal[0, -1],
        overlap=np.minimum(np.cumsum(anomalous.weight)[last] / max(regions, 1), 1.0),
    )
