"""Pixels of many anomaly maps, counted exactly without holding the maps.

Maps are read one at a time: defective images' twice, normal ones' once. The first reading keeps the defective
pixels, which are few. The second counts, at each level a defective pixel has, the normal pixels that reach it, in
sorted chunks. Memory grows with the defective pixels, about 150 bytes for each at the highest point, and with the
images, about 100 KiB for each; the chunks take 0.3 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.evaluation.aupro import label_regions
from almrr_pipeline.evaluation.curves import Curve, Floats

T_co = TypeVar("T_co", covariant=True)
Bools = npt.NDArray[np.bool_]
MapArray = npt.NDArray[np.float32]
"""Anomaly map, larger is more anomalous, shape (H, W)."""

_CHUNK = 1 << 25
"""Normal pixels that are merged before they are counted; 128 MiB."""
_EDGE_LEVELS = 2048
"""Levels at which each image's pixels are counted for resampling."""


class Indexed(Protocol[T_co]):
    """Anything with a length and items by position, which may be read from disk only when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


@dataclass(frozen=True)
class PixelSource:
    """Anomaly maps with their ground truth, read and checked one image at a time.

    Attributes:
        maps: float (H, W) each, finite; sizes may differ from image to image.
        masks: bool (H, W) each, True where defective. None for a normal image means that nothing is defective; None
            for a defective image, or in place of all masks, means that its ground truth is unknown.
        labels: True where the image is defective, shape (n,).
    """

    maps: Indexed[MapArray]
    masks: Indexed[Bools | None] | None
    labels: Bools

    def read_map(self, index: int) -> MapArray:
        """Anomaly map of one image, float32 (H, W).

        Raises:
            AlmrrError: it is not an image's map, or a value is not finite.
        """
        values = np.asarray(self.maps[index], dtype=np.float32)
        if values.ndim != 2 or values.size == 0:
            raise AlmrrError(
                f"The anomaly map of test image {index} has the shape {values.shape}; it must be (rows, columns)."
            )
        if not np.isfinite(values).all():
            raise AlmrrError(
                f"The anomaly map of test image {index} has values that are not finite; "
                "the model's weights are broken, train again."
            )
        return values + np.float32(0.0)  # turns -0 into 0, which compares equal but sorts apart by its bits

    def read_mask(self, index: int) -> Bools | None:
        """Ground truth of one image, bool (H, W); None if nothing is known to be defective in it.

        Raises:
            AlmrrError: a normal image's mask has defective pixels.
        """
        mask = None if self.masks is None else self.masks[index]
        if mask is None:
            return None
        mask = np.asarray(mask, dtype=bool)
        if mask.any() and not self.labels[index]:
            raise AlmrrError(
                f"Test image {index} is labeled normal, but its mask has defective pixels; correct one of them."
            )
        return mask

    def read(self, index: int) -> tuple[MapArray, Bools]:
        """Anomaly map and ground truth of one image.

        Raises:
            AlmrrError: their shapes differ, or as `read_map` and `read_mask`.
        """
        values, mask = self.read_map(index), self.read_mask(index)
        if mask is None:
            return values, np.zeros(values.shape, dtype=bool)
        if mask.shape != values.shape:
            raise AlmrrError(
                f"Test image {index}: the anomaly map is {values.shape} and the mask {mask.shape}; "
                "resize the mask to the map."
            )
        return values, mask


@dataclass(frozen=True)
class DefectivePixels:
    """All defective pixels of the test set, by falling score.

    Attributes:
        score: float32, shape (P,).
        region: index of the region a pixel belongs to, shape (P,).
        area: pixels of each region, shape (R,).
        image: index of the image each region lies in, shape (R,).
    """

    score: npt.NDArray[np.float32]
    region: npt.NDArray[np.uint32]
    area: npt.NDArray[np.int64]
    image: npt.NDArray[np.int64]

    @cached_property
    def weight(self) -> Floats:
        """What each pixel adds to the found share of its region, summed over the regions: 1 / area, shape (P,)."""
        return 1.0 / self.area[self.region]

    def of_images(self, chosen: Bools) -> DefectivePixels:
        """Keep the pixels of the images whose index is True in `chosen`; regions keep their numbers."""
        kept = chosen[self.image]
        pixels = kept[self.region]
        return DefectivePixels(self.score[pixels], self.region[pixels], np.where(kept, self.area, 0), self.image)

    def last_of_level(self) -> npt.NDArray[np.intp]:
        """Position of the last pixel of each distinct score, by falling score, shape (K,)."""
        return np.flatnonzero(np.append(self.score[1:] != self.score[:-1], self.score.size > 0))


def gather_defective(source: PixelSource) -> tuple[DefectivePixels, Bools]:
    """Read the images that have a mask with defective pixels and keep those pixels' scores and regions.

    Returns:
        The defective pixels; and for each image whether its ground truth is known, shape (n,).
    """
    known = ~source.labels
    keys: list[npt.NDArray[np.uint64]] = []
    areas: list[npt.NDArray[np.int64]] = []
    images: list[npt.NDArray[np.int64]] = []
    regions = 0
    for index in np.flatnonzero(source.labels):
        mask = source.read_mask(int(index))
        known[index] = mask is not None
        if mask is None or not mask.any():
            continue
        values, mask = source.read(int(index))
        labeled, count = label_regions(mask)
        inside = labeled[mask] - 1
        keys.append(_pack(values[mask], inside + regions))
        areas.append(np.bincount(inside, minlength=count))
        images.append(np.full(count, index, dtype=np.int64))
        regions += count
    packed = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    del keys
    packed.sort()
    score, region = _unpack(packed[::-1])
    return DefectivePixels(score, region, _joined(areas), _joined(images)), known


class NormalCounter:
    """Counts how many of the values it is given reach each of some levels, exactly, in bounded memory."""

    def __init__(self, levels: npt.NDArray[np.float32]) -> None:
        """Levels fall strictly, shape (K,)."""
        self._rising = np.ascontiguousarray(levels[::-1])
        self._below = np.zeros(len(levels), dtype=np.int64)
        self._up_to = np.zeros(len(levels), dtype=np.int64)
        self._waiting: list[npt.NDArray[np.float32]] = []
        self._waiting_pixels = 0
        self.total = 0

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count these values in, rising, shape (n,)."""
        self._waiting.append(values)
        self._waiting_pixels += len(values)
        self.total += len(values)
        if self._waiting_pixels >= _CHUNK:
            self._flush()

    def counts(self) -> NormalCounts:
        """What was counted so far, at the falling levels."""
        self._flush()
        return NormalCounts(self.total - self._below[::-1], self.total - self._up_to[::-1], self.total)

    def _flush(self) -> None:
        if self._waiting:
            chunk = np.concatenate(self._waiting)
            self._waiting, self._waiting_pixels = [], 0
            chunk.sort(kind="stable")  # timsort, which merges the sorted runs three times as fast as a fresh sort
            self._below += np.searchsorted(chunk, self._rising, side="left")
            self._up_to += np.searchsorted(chunk, self._rising, side="right")


@dataclass(frozen=True)
class NormalCounts:
    """Normal pixels at K falling levels: those that reach the level, those above it, and all."""

    reaching: npt.NDArray[np.int64]
    above: npt.NDArray[np.int64]
    total: int

    def __add__(self, other: NormalCounts) -> NormalCounts:
        """Counts of two disjoint sets of pixels at the same levels."""
        return NormalCounts(self.reaching + other.reaching, self.above + other.above, self.total + other.total)


@dataclass
class ImageCounts:
    """What resampling needs of each image: its pixels counted at E falling edges, all float64.

    Attributes:
        edge: falling score levels, shape (E,).
        normal: normal pixels that reach the edge, shape (n, E).
        normals: normal pixels, shape (n,).
        peak: maximum of the anomaly map, shape (n,).
    """

    edge: npt.NDArray[np.float32]
    normal: Floats
    normals: Floats
    peak: Floats

    @classmethod
    def empty(cls, edge: npt.NDArray[np.float32], images: int) -> ImageCounts:
        """Nothing counted yet."""
        return cls(edge, np.zeros((images, len(edge))), np.zeros(images), np.zeros(images))

    def record(self, index: int, peak: float, ranked: npt.NDArray[np.float32]) -> None:
        """Fill in one image from the rising scores of its normal pixels."""
        self.peak[index] = peak
        self.normals[index] = len(ranked)
        self.normal[index] = len(ranked) - np.searchsorted(ranked, self.edge[::-1])[::-1]

    def reaching(self, edge: np.float32) -> Floats:
        """Normal pixels of each image that reach one of the edges, shape (n,)."""
        rising = self.edge[::-1]
        return self.normal[:, len(rising) - 1 - int(np.searchsorted(rising, edge))]


def choose_edges(defective: DefectivePixels, threshold: float | None) -> npt.NDArray[np.float32]:
    """Levels for per-image counts: evenly by defective pixels and by overlap, each with the value just above it.

    With no more than 2048 distinct defective scores these are all of them, and counts at the edges lose nothing.
    Otherwise a step between edges holds at most 1/1023 of the defective pixels and as much of the overlap, unless more
    are tied.

    Args:
        defective: all defective pixels.
        threshold: the decision threshold, at which pixels are to be counted too; None if there is none.

    Returns:
        float32, strictly falling, shape (E,), E at most 4097.
    """
    level = defective.score[_spread(defective)]
    decision = [] if threshold is None else [just_above(threshold)]
    edges = np.concatenate([level, np.nextafter(level, np.float32(np.inf)), np.asarray(decision, np.float32)])
    return np.ascontiguousarray(np.unique(edges)[::-1])


def just_above(threshold: float) -> np.float32:
    """Find the smallest float32 above a threshold, so that `score > threshold` becomes `score >= edge`."""
    nearest = np.float32(threshold)
    return nearest if float(nearest) > threshold else np.nextafter(nearest, np.float32(np.inf))


def _spread(defective: DefectivePixels) -> npt.NDArray[np.intp]:
    """Positions of at most 2048 distinct scores, half of them evenly by pixels and half by overlap."""
    last = defective.last_of_level()
    if len(last) <= _EDGE_LEVELS:
        return last
    overlap = np.cumsum(defective.weight)[last]
    by_pixels = np.searchsorted(last, np.linspace(last[0], last[-1], _EDGE_LEVELS // 2))
    by_overlap = np.searchsorted(overlap, np.linspace(overlap[0], overlap[-1], _EDGE_LEVELS // 2))
    return last[np.union1d(by_pixels, by_overlap)]


def count_normal(
    source: PixelSource,
    groups: Sequence[npt.NDArray[np.intp]],
    levels: npt.NDArray[np.float32],
    images: ImageCounts,
) -> Iterator[NormalCounts]:
    """Count the normal pixels of one group of images after the other at the defective pixels' levels.

    Args:
        source: maps and masks.
        groups: image indices of each group.
        levels: falling, shape (K,).
        images: filled in for each image on the way.

    Yields:
        The counts of each group.
    """
    for group in groups:
        counter = NormalCounter(levels)
        for index in group:
            values, mask = source.read(int(index))
            ranked = np.sort(values[~mask])
            images.record(int(index), float(values.max()), ranked)
            counter.add(ranked)
        yield counter.counts()


def trace_pixels(defective: DefectivePixels, levels: npt.NDArray[np.float32], normal: NormalCounts) -> Curve:
    """Build the curve of defective pixels against normal ones.

    Args:
        defective: all, or those of some images.
        levels: falling levels at which the normal pixels were counted; every defective score is one of them.
        normal: the counts at those levels.
    """
    last = defective.last_of_level()
    level = defective.score[last]
    at = slice(None) if len(level) == len(levels) else len(levels) - 1 - np.searchsorted(levels[::-1], level)
    regions = int(np.count_nonzero(defective.area))
    found = np.cumsum(defective.weight)[last]
    return Curve(
        level=level,
        true=last + 1,
        false=normal.reaching[at],
        false_before=normal.above[at],
        defective=np.asarray(len(defective.score)),
        normal=np.asarray(normal.total),
        overlap=np.minimum(found / max(regions, 1), 1.0),
    )


def _pack(scores: npt.NDArray[np.float32], regions: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
    """One sortable number a pixel: the score's bits, in an order that is the numbers', above the region's index."""
    bits = scores.view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered.astype(np.uint64) << np.uint64(32)) | regions.astype(np.uint64)


def _unpack(packed: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint32]]:
    ordered = (packed >> np.uint64(32)).astype(np.uint32)
    bits = np.where(ordered >> 31, ordered & np.uint32((1 << 31) - 1), ~ordered)
    return bits.view(np.float32), packed.astype(np.uint32)


def _joined(parts: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
