"""Examination of a folder of images before training: what would give wrong numbers, and why.

Each image is decoded once and only a few kilobytes of it are kept.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, label

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import (
    ImageFacts,
    decide_ranges,
    find_narrow_range,
    inspect_bytes,
    read_bytes,
    resize_image,
)
from almrr_pipeline.common.masks import explain_size, inspect_mask
from almrr_pipeline.common.progress import track
from almrr_pipeline.datasets.account import FolderAccount, inspect_folder, show
from almrr_pipeline.datasets.manifest import Item

NEAR_DUPLICATE = 0.95
"""Correlation of fine structure above which two images are taken for one, saved again."""
SAME_SPECIMEN = 0.7
"""Correlation above which two images may show the same piece of surface.

Of 101025 pairs of MT-defect's images it finds 99 % of those that `same_tile` finds with four times
the pixels, and 4 % of what it finds are others.
"""
_SIDE = 48  # pixels of a signature; 9 kB an image
_FINE, _COARSE, _LOCAL = 0.5, 2.5, 4.0
"""Gaussian widths in pixels: noise removed, illumination removed, local contrast normalized."""
_FLAT = 0.25  # gray values; the structure of images with less is noise of compression
_SHIFTS = (-1, 0, 1)  # pixels of a signature by which two photographs may be apart
_MOST_COMPARED = 3000  # images; their correlations take about 10 s and 40 MB
_NAMED = 3  # files that a finding names before it counts the rest
_FEW_PIXELS = 4.0  # area at the network's input below which a region is next to invisible
_MANY_LOST = 0.05  # of the regions: more are no accident
_WIDEST_INPUT = 512  # pixels; beyond, tiles cost less memory than a larger input
_STEP = 16  # the input's sides are multiples of it
_THREADS = 4  # each holds one decoded image

Level = Literal["error", "warning"]
Signature = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Finding:
    """Something to mend: an error gives wrong numbers, a warning may."""

    level: Level
    text: str
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Examined:
    """What is kept of an image and its mask."""

    item: Item
    facts: ImageFacts
    content: bytes  # hash of the pixels
    signature: Signature  # (48, 48), mean 0 and norm 1; all 0 without any structure
    coverage: float | None = None  # fraction of the image that its mask marks
    regions: tuple[int, ...] = ()  # areas in pixels


@dataclass
class Diagnosis:
    """Result of `examine`."""

    account: FolderAccount
    images: list[Examined]
    image_size: tuple[int, int]  # rows and columns of the network's input
    findings: list[Finding] = field(default_factory=list)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def has_errors(self) -> bool:
        """Whether training would give wrong numbers."""
        return any(finding.level == "error" for finding in self.findings)

    def lines(self) -> Iterator[str]:
        """Lines of text about what would be used as what."""
        yield f"{self.account.root}"
        groups: dict[tuple[str, str], list[Examined]] = defaultdict(list)
        for each in self.images:
            groups[each.item.split, each.item.defect_type].append(each)
        for (split, defect_type), group in groups.items():
            yield f"  {split:<11}{defect_type:<18}{len(group):>6} images{_describe_masks(group)}"
        for title, values in (
            ("sizes", [f"{e.facts.size[1]} x {e.facts.size[0]}" for e in self.images]),
            ("modes", [e.facts.mode for e in self.images]),
            (
                "values",
                [f"{e.facts.dtype} {_span(self.images, e.facts.dtype)}" for e in self.images],
            ),
        ):
            yield f"  {title:<11}{_count_values(values)}"
        for dtype, (low, high) in self.ranges.items():
            yield f"  {'range':<11}{dtype}: {low:g} is black, {high:g} is white"
        reasons = Counter(each.reason for each in self.account.unused if each.level == "info")
        for reason, count in reasons.items():
            yield f"  {'not used':<11}{count}: {reason}"


def _describe_masks(group: Sequence[Examined]) -> str:
    masked = [each.coverage for each in group if each.coverage is not None]
    if not masked:
        return "" if group[0].item.label == "normal" else ", no masks"
    regions = sum(len(each.regions) for each in group)
    return (
        f", {len(masked)} masks: {regions} regions, {min(masked):.2%} to {max(masked):.2%} of an "
        "image"
    )


def _count_values(values: Iterable[str]) -> str:
    counted = Counter(values).most_common()
    more = f", and {len(counted) - _NAMED} more" if len(counted) > _NAMED else ""
    return ", ".join(f"{value} ({count})" for value, count in counted[:_NAMED]) + more


def _span(images: Iterable[Examined], dtype: str) -> str:
    same = [each.facts for each in images if each.facts.dtype == dtype]
    return f"{min(f.low for f in same):g} to {max(f.high for f in same):g}"


def examine(
    folder: Path,
    *,
    normal_names: Sequence[str] | None = None,
    image_size: tuple[int, int] = (256, 256),
) -> Diagnosis:
    """Examine a folder of the user's images.

    Args:
        folder: as for `inspect_folder`.
        normal_names: names of folders of normal images; None for the usual ones.
        image_size: rows and columns of the network's input.

    Raises:
        AlmrrError: the folder's layout is not one of those known, or a folder cannot be read.
    """
    account = inspect_folder(folder, normal_names=normal_names)
    diagnosis = Diagnosis(account, [], image_size)
    findings = diagnosis.findings
    levels: tuple[Level, Level] = ("error", "warning")
    for level in levels:
        findings += [Finding(level, f"not used: {text}") for text in account.sentences(level)]
    problems: dict[tuple[Level, str], list[Finding]] = defaultdict(list)
    for each, faults in _open_all(account.items, account.folder):
        if each is not None:
            diagnosis.images.append(each)
        for finding in faults:
            problems[finding.level, re.sub(r"[\d., ]+", " ", finding.text)].append(finding)
    for (level, _), of_kind in problems.items():  # equal but for their numbers
        paths = [path for finding in of_kind for path in finding.images]
        findings.append(_about(level, paths, account.folder, of_kind[0].text))
    for check in (_check_splits, _check_values, _check_copies, _check_looks, _check_size):
        findings += check(diagnosis)
    findings.sort(key=lambda finding: finding.level)  # errors first
    return diagnosis


def _about(level: Level, paths: Sequence[Path], folder: Path, text: str) -> Finding:
    named = ", ".join(show(path, folder) for path in paths[:_NAMED])
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return Finding(level, f"{named}{more}: {text}", tuple(paths))


def _open_all(
    items: Sequence[Item], folder: Path
) -> Iterator[tuple[Examined | None, list[Finding]]]:
    remaining = iter(items)
    threads = min(_THREADS, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(threads) as pool,
        track(len(items), unit="images", description="check images") as advance,
    ):
        while batch := list(islice(remaining, 8 * threads)):
            for result in pool.map(lambda item: _open(item, folder), batch):
                advance(1)
                yield result


def _open(item: Item, folder: Path) -> tuple[Examined | None, list[Finding]]:
    name, path = Path(show(item.image, folder)), item.image
    try:
        facts, pixels = inspect_bytes(read_bytes(path, name=name), name)
    except AlmrrError as error:
        return None, [Finding("error", _without(name, error), (path,))]
    coverage, regions, faults = _open_mask(item, facts, folder)
    content = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()
    signature = _compute_signature(pixels)
    return Examined(item, facts, content, signature, coverage, regions), faults


def _without(name: Path, error: AlmrrError) -> str:
    return str(error).removeprefix(str(name)).lstrip(": ").rstrip(".")


def _open_mask(
    item: Item, image: ImageFacts, folder: Path
) -> tuple[float | None, tuple[int, ...], list[Finding]]:
    if item.mask is None:
        return None, (), []
    if not item.mask.is_file():
        where = show(item.mask.parent, folder)
        return None, (), [Finding("error", f"there is no mask in {where}", (item.image,))]
    name = Path(show(item.mask, folder))
    try:
        facts = inspect_mask(item.mask, name=name)
    except AlmrrError as error:
        return None, (), [Finding("error", _without(name, error), (item.mask,))]
    any_image = Path("file")  # no name, so that equal differences are one finding
    difference = explain_size(facts, image.size, image=any_image, image_turned=image.turned)
    level: Level = "warning" if _is_smoothed(facts.values) else "error"
    problems: list[tuple[Level, str | None]] = [(level, facts.problem), ("error", difference)]
    faults = [Finding(level, text, (item.mask,)) for level, text in problems if text]
    labels, _ = label(facts.mask, np.ones((3, 3)))
    regions = tuple(int(area) for area in np.bincount(labels.ravel())[1:])
    if not regions:
        text = "the mask shows no defect: none of its image's pixels counts as anomalous"
        faults.append(Finding("warning", text, (item.mask,)))
    return facts.coverage, regions, faults


def _is_smoothed(values: Sequence[float]) -> bool:
    """Whether a mask's values are those of a smoothed outline: white, and others at both sides."""
    return values[-1] == 255 and any(127 < value < 255 for value in values)


def _compute_signature(image: ImageArray) -> Signature:
    """Fine structure without illumination and contrast: (48, 48), mean 0 and norm 1."""
    gray = resize_image(image, (_SIDE, _SIDE)).mean(axis=2)
    detail = gaussian_filter(gray, _FINE) - gaussian_filter(gray, _COARSE)
    if detail.std() < _FLAT:
        return np.zeros((_SIDE, _SIDE), np.float32)
    detail /= np.sqrt(gaussian_filter(detail**2, _LOCAL)) + 1e-6
    detail -= detail.mean()
    return np.asarray(detail / max(float(np.linalg.norm(detail)), 1e-6), np.float32)


def _check_splits(diagnosis: Diagnosis) -> Iterator[Finding]:
    counts = Counter((each.item.split, each.item.label) for each in diagnosis.images)
    if not counts["train", "normal"]:
        yield Finding("error", "there is no normal image to train on")
    for kind in ("normal", "defective"):
        if not counts["test", kind]:
            text = f"the test has no {kind} image: image AUROC and image AP are undefined"
            yield Finding("warning", text)
    train = [each for each in diagnosis.images if each.item.split == "train"]
    defective = [each for each in diagnosis.images if each.item.label == "defective"]
    for what, of in (("mode", lambda e: e.facts.mode), ("size", _round_size)):
        normal_has, defective_has = {of(e) for e in train}, {of(e) for e in defective}
        if normal_has and defective_has and not normal_has & defective_has:
            yield Finding(
                "warning",
                f"no defective image has the {what} of a training image: the {what} alone tells "
                "them apart; take both in the same way",
            )


def _round_size(each: Examined) -> tuple[int, int]:
    """Size in steps of 64 pixels: a few rows more or less tell nothing."""
    return round(each.facts.size[0] / 64), round(each.facts.size[1] / 64)


def _check_values(diagnosis: Diagnosis) -> Iterator[Finding]:
    normal = [each.facts for each in diagnosis.images if each.item.split != "test"]
    try:
        diagnosis.ranges = decide_ranges(normal)
    except AlmrrError as error:
        yield Finding("error", str(error).rstrip("."))
        return
    if narrow := find_narrow_range(normal, diagnosis.ranges):
        yield Finding("warning", narrow)
    for dtype in {each.facts.dtype for each in diagnosis.images} - {"uint8", *diagnosis.ranges}:
        paths = [each.item.image for each in diagnosis.images if each.facts.dtype == dtype]
        text = f"its values are {dtype}, and no training image's are; save all alike"
        yield _about("error", paths, diagnosis.account.folder, text)


def _check_copies(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Equal pixels: an error across splits or labels, a warning within a split."""
    groups: dict[bytes, list[Item]] = defaultdict(list)
    for each in diagnosis.images:
        groups[each.content].append(each.item)
    pairs: dict[tuple[Level, str], list[Path]] = defaultdict(list)
    for items in groups.values():
        splits, labels = {item.split for item in items}, {item.label for item in items}
        if len(labels) > 1:
            key: tuple[Level, str] = ("error", "the same image is normal and defective; keep one")
        elif len(splits) > 1:
            key = "error", f"the same image is in {' and '.join(sorted(splits))}; keep one"
        elif len(items) > 1:
            key = "warning", f"the same image is several times in {items[0].split}; keep one"
        else:
            continue
        pairs[key] += [item.image for item in items]
    for (level, text), paths in pairs.items():
        yield _about(level, paths, diagnosis.account.folder, text)


def _check_looks(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Near-duplicates between splits, and specimens that look the same."""
    images = [each for each in diagnosis.images if each.signature.any()]
    images = images[:: math.ceil(len(images) / _MOST_COMPARED) or 1]
    near: list[Path] = []
    same: list[tuple[Examined, Examined]] = []
    for first, second, correlation in _similar_pairs(images):
        crosses = first.item.split != second.item.split
        if first.content == second.content or not crosses:
            continue
        if correlation > NEAR_DUPLICATE:
            near += [first.item.image, second.item.image]
        elif not first.item.specimen or first.item.specimen != second.item.specimen:
            same.append((first, second))
    if near:
        text = "nearly the same image is in two splits, saved or taken again; keep one of each pair"
        yield _about("error", list(dict.fromkeys(near)), diagnosis.account.folder, text)
    if same:
        paths = list(dict.fromkeys(each.item.image for pair in same for each in pair))
        text = (
            f"{len(same)} pairs of images in different splits look like the same specimen; if they "
            "are, list them in specimens.csv and keep each specimen in one split"
        )
        yield _about("warning", paths, diagnosis.account.folder, text)


def _similar_pairs(images: Sequence[Examined]) -> Iterator[tuple[Examined, Examined, float]]:
    """Pairs above SAME_SPECIMEN, in blocks, so that memory stays bounded."""
    if not images:
        return
    signatures = np.stack([each.signature for each in images])
    flat = signatures.reshape(len(images), -1)
    for start in range(0, len(images), 256):
        block = signatures[start : start + 256]
        best = np.full((len(block), len(images)), -1.0, np.float32)
        for rows in _SHIFTS:
            for columns in _SHIFTS:
                shifted = np.roll(block, (rows, columns), (1, 2)).reshape(len(block), -1)
                np.maximum(best, shifted @ flat.T, out=best)
        for row, column in np.argwhere(best > SAME_SPECIMEN):
            if start + row < column:
                yield images[start + row], images[column], float(best[row, column])


def _check_size(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Regions that next to vanish at the network's input, with a size or tiles that keep them."""
    rows, columns = diagnosis.image_size
    areas, shrunk, paths = [], [], []
    for each in diagnosis.images:
        height, width = each.facts.size
        scaled = [area * rows * columns / (height * width) for area in each.regions]
        areas += list(each.regions)
        shrunk += scaled
        paths += [each.item.image] if any(area < _FEW_PIXELS for area in scaled) else []
    lost = sum(area < _FEW_PIXELS for area in shrunk)
    if not lost or lost <= _MANY_LOST * len(shrunk):
        return
    factor = math.sqrt(_FEW_PIXELS / float(np.quantile(shrunk, _MANY_LOST)))
    larger = [math.ceil(side * factor / _STEP) * _STEP for side in (rows, columns)]
    advice = f"set data.image_size to {larger}"
    if max(larger) > _WIDEST_INPUT:
        scale = min(1.0, math.sqrt(_FEW_PIXELS / float(np.quantile(areas, _MANY_LOST))))
        rounded = math.ceil(20 * scale) / 20
        advice = f"set data.tiling.enabled to true and data.tiling.scale to {rounded:g}"
    text = (
        f"{lost} of {len(shrunk)} defective regions have fewer than {_FEW_PIXELS:g} pixels at an "
        f"input of {columns} x {rows}; {advice}"
    )
    yield _about("warning", paths, diagnosis.account.folder, text)
