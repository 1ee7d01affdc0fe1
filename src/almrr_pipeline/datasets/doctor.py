"""Examination of a folder of images before training: what would give wrong numbers, and why.

`examine` looks at a user's folder; `report_doubts` makes the same checks of what was fetched. Each
image is decoded once and only a few kilobytes of it are kept.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Literal

import numpy as np

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import escape_name, escape_text
from almrr_pipeline.common.images import ImageFacts, Reading, decide_ranges, find_narrow_range
from almrr_pipeline.common.progress import track
from almrr_pipeline.common.region import Region
from almrr_pipeline.config import DataSettings
from almrr_pipeline.datasets.account import FolderAccount, inspect_folder, show
from almrr_pipeline.datasets.interest import decide_region, is_outside
from almrr_pipeline.datasets.looks import NEAR_DUPLICATE, is_compared, similar_pairs
from almrr_pipeline.datasets.manifest import Item, Opened, open_image, open_mask

logger = logging.getLogger(__name__)

_NAMED = 3  # files that a finding names before it counts the rest
_FEW_PIXELS = 4.0  # area at the network's input below which a region is next to invisible
_MANY_LOST = 0.05  # of the regions: more are no accident
_WIDEST_INPUT = 512  # pixels; beyond, tiles cost less memory than a larger input
_STEP = 16  # the input's sides are multiples of it
_THREADS = 4  # each holds one decoded image

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something to mend: an error gives wrong numbers, a warning may."""

    level: Level
    text: str
    images: tuple[Path, ...] = ()


@dataclass
class Diagnosis:
    """Result of `examine`."""

    account: FolderAccount
    settings: DataSettings
    images: list[Opened]
    findings: list[Finding] = field(default_factory=list)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    region: Region | None = None

    @property
    def has_errors(self) -> bool:
        """Whether training would give wrong numbers."""
        return any(finding.level == "error" for finding in self.findings)

    def lines(self) -> Iterator[str]:
        """Lines of text about what would be used as what."""
        yield escape_name(self.account.root)
        groups: dict[tuple[str, str], list[Opened]] = defaultdict(list)
        for each in self.images:
            groups[each.item.split, each.item.defect_type].append(each)
        for (split, defect_type), group in groups.items():
            name = escape_text(defect_type)
            yield f"  {split:<11}{name:<18}{len(group):>6} images{_describe_masks(group)}"
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
        if self.region is not None:
            yield f"  {'region':<11}{self.region.fraction:.1%} of an image counts"
        reasons = Counter(each.reason for each in self.account.unused if each.level == "info")
        for reason, count in reasons.items():
            yield f"  {'not used':<11}{count}: {reason}"


def _describe_masks(group: Sequence[Opened]) -> str:
    masks = [each.mask for each in group if each.mask is not None]
    if not masks:
        return "" if group[0].item.label == "normal" else ", no masks"
    regions, coverage = sum(len(m.regions) for m in masks), [m.coverage for m in masks]
    covered = f"{min(coverage):.2%} to {max(coverage):.2%} of an image"
    return f", {len(masks)} masks: {regions} regions, {covered}"


def _count_values(values: Iterable[str]) -> str:
    counted = Counter(values).most_common()
    more = f", and {len(counted) - _NAMED} more" if len(counted) > _NAMED else ""
    return ", ".join(f"{value} ({count})" for value, count in counted[:_NAMED]) + more


def _span(images: Iterable[Opened], dtype: str) -> str:
    same = [each.facts for each in images if each.facts.dtype == dtype]
    return f"{min(f.low for f in same):g} to {max(f.high for f in same):g}"


def examine(folder: Path, settings: DataSettings | None = None) -> Diagnosis:
    """Examine a folder of the user's images.

    Args:
        folder: as for `inspect_folder`.
        settings: of these normal_names, image_size, value_range, mask_values, mask_threshold,
            max_megapixels and region.

    Raises:
        AlmrrError: the folder's layout is not one of those known, or a folder cannot be read.
    """
    settings = settings or DataSettings()
    account = inspect_folder(folder, normal_names=settings.normal_names)
    diagnosis = Diagnosis(account, settings, [])
    findings = diagnosis.findings
    levels: tuple[Level, Level] = ("error", "warning")
    for level in levels:
        findings += [Finding(level, f"not used: {text}") for text in account.sentences(level)]
    faults: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for opened, fault in _open_all(account.items, account.folder, settings):
        diagnosis.images += [opened] if opened else []
        if fault is not None:
            faults[re.sub(r"[\d., ]+", " ", fault[1])].append(fault)
    for of_kind in faults.values():  # equal but for their numbers
        findings.append(_about("error", [path for path, _ in of_kind], folder, of_kind[0][1]))
    if not any(each.item.split == "train" for each in diagnosis.images):
        findings.append(Finding("error", "there is no normal image to train on"))
    findings += _find_doubts(diagnosis.images, folder, settings)
    findings += _check_size(diagnosis)
    findings += _check_region(diagnosis)
    with suppress(AlmrrError):  # it is among the findings
        diagnosis.ranges = decide_ranges(_of_training(diagnosis.images), settings.value_range)
    findings.sort(key=lambda finding: finding.level)  # errors first
    return diagnosis


def report_doubts(
    images: Sequence[Opened], folder: Path, settings: DataSettings, *, name: str, strict: bool
) -> None:
    """Log what gives, or may give, wrong numbers with the images of a category in `folder`.

    Raises:
        AlmrrError: where `strict`, if something gives wrong numbers.
    """
    findings = list(_find_doubts(images, folder, settings))
    errors = [finding.text for finding in findings if finding.level == "error"]
    if errors and strict:
        raise AlmrrError(f"{name}: {'. '.join(errors)}.")
    for finding in findings:
        logger.warning("%s: %s", name, finding.text)


def _find_doubts(
    images: Sequence[Opened], folder: Path, settings: DataSettings
) -> Iterator[Finding]:
    yield from _check_masks(images, folder)
    yield from _check_splits(images)
    yield from _check_values(images, folder, settings)
    yield from _check_copies(images, folder)
    yield from _check_looks(images, folder)


def _about(level: Level, paths: Sequence[Path], folder: Path, text: str) -> Finding:
    named = ", ".join(show(path, folder) for path in paths[:_NAMED])
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return Finding(level, f"{named}{more}: {text}", tuple(paths))


def _open_all(
    items: Sequence[Item], folder: Path, settings: DataSettings
) -> Iterator[tuple[Opened | None, tuple[Path, str] | None]]:
    """Open all images and masks; instead of raising, return the file at fault and the reason."""

    def open_item(numbered: tuple[int, Item]) -> tuple[Opened | None, tuple[Path, str] | None]:
        index, item = numbered
        name, has_look = Path(show(item.image, folder)), is_compared(index, len(items))
        try:
            opened = open_image(item, name, settings, has_look=has_look)
        except AlmrrError as error:
            return None, (item.image, _without(error, name))
        if item.mask is None:
            return opened, None
        mask_name = Path(show(item.mask, folder))
        try:
            mask = open_mask(item.mask, mask_name, opened, name, settings)
        except AlmrrError as error:
            at_fault = item.mask if item.mask.is_file() else item.image
            return opened, (at_fault, _without(error, name, mask_name))
        return replace(opened, mask=mask), None

    remaining = iter(enumerate(items))
    threads = min(_THREADS, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(threads) as pool,
        track(len(items), unit="images", description="check images") as advance,
    ):
        while batch := list(islice(remaining, 8 * threads)):
            for result in pool.map(open_item, batch):
                advance(1)
                yield result


def _without(error: AlmrrError, *names: Path) -> str:
    """The message without the files' names, so that equal faults are one finding."""
    text = str(error)
    for name in names:
        text = text.replace(f"{name.as_posix()} ", "").replace(f" {name.as_posix()}", "")
    return text.lstrip(": ").rstrip(".")


def _check_masks(images: Iterable[Opened], folder: Path) -> Iterator[Finding]:
    """Masks that may mean something else, and empty ones."""
    doubts: dict[tuple[Level, str], list[tuple[Path, str]]] = defaultdict(list)
    for each in images:
        if each.mask is None or each.item.mask is None:
            continue
        if each.mask.doubt:
            level: Level = "warning" if each.mask.is_smoothed else "error"
            kind = re.sub(r"[\d., ]+", " ", each.mask.doubt)  # equal but for their numbers
            doubts[level, kind].append((each.item.mask, each.mask.doubt))
        if not each.mask.regions:
            text = "the mask shows no defect: none of its image's pixels counts as anomalous"
            doubts["warning", text].append((each.item.mask, text))
    for (level, _), of_kind in doubts.items():
        yield _about(level, [path for path, _ in of_kind], folder, of_kind[0][1])


def _check_splits(images: Sequence[Opened]) -> Iterator[Finding]:
    counts = Counter((each.item.split, each.item.label) for each in images)
    for kind in ("normal", "defective"):
        if not counts["test", kind]:
            text = f"the test has no {kind} image: image AUROC and image AP are undefined"
            yield Finding("warning", text)
    train = [each for each in images if each.item.split == "train"]
    defective = [each for each in images if each.item.label == "defective"]
    for what, of in (("mode", lambda e: e.facts.mode), ("size", _round_size)):
        normal_has, defective_has = {of(e) for e in train}, {of(e) for e in defective}
        if normal_has and defective_has and not normal_has & defective_has:
            yield Finding(
                "warning",
                f"no defective image has the {what} of a training image: the {what} alone tells "
                "them apart; take both in the same way",
            )


def _round_size(each: Opened) -> tuple[int, int]:
    """Size in steps of 64 pixels: a few rows more or less tell nothing."""
    return round(each.facts.size[0] / 64), round(each.facts.size[1] / 64)


def _of_training(images: Iterable[Opened]) -> list[ImageFacts]:
    """The facts that decide the range of values: those of normal images outside of the test."""
    return [each.facts for each in images if each.item.split != "test"]


def _check_values(
    images: Sequence[Opened], folder: Path, settings: DataSettings
) -> Iterator[Finding]:
    training = _of_training(images)
    try:
        ranges = decide_ranges(training, settings.value_range)
    except AlmrrError as error:
        yield Finding("error", str(error).rstrip("."))
        return
    if narrow := find_narrow_range(training, ranges):
        yield Finding("warning", narrow)
    reading = Reading(value_ranges=ranges)
    of_type: dict[str, list[Path]] = defaultdict(list)
    for each in images:
        if reading.range_of(each.facts.dtype) is None:
            of_type[each.facts.dtype].append(each.item.image)
    for dtype, paths in of_type.items():
        text = f"its values are {dtype}, and no training image's are; save all alike"
        yield _about("error", paths, folder, text)


def _check_copies(images: Iterable[Opened], folder: Path) -> Iterator[Finding]:
    """Equal pixels: an error across splits or labels, a warning within a split."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for each in images:
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
        yield _about(level, paths, folder, text)


def _check_looks(images: Iterable[Opened], folder: Path) -> Iterator[Finding]:
    """Near-duplicates between splits, and specimens that look the same."""
    by_split: dict[str, list[Opened]] = defaultdict(list)
    for each in images:
        if each.look is not None and each.look.any():
            by_split[each.item.split].append(each)
    near: list[Path] = []
    same: list[tuple[Path, Path]] = []
    for first, second in combinations(by_split.values(), 2):
        looks = [
            np.stack([each.look for each in side if each.look is not None])
            for side in (first, second)
        ]
        for row, column, correlation in similar_pairs(looks[0], looks[1]):
            one, other = first[row], second[column]
            pair = one.item.image, other.item.image
            if one.content == other.content:
                continue  # named as copies
            if correlation > NEAR_DUPLICATE:
                near += pair
            elif not one.item.specimen or one.item.specimen != other.item.specimen:
                same.append(pair)
    if near:
        text = "nearly the same image is in two splits, saved or taken again; keep one of each pair"
        yield _about("error", list(dict.fromkeys(near)), folder, text)
    if same:
        paths = list(dict.fromkeys(path for pair in same for path in pair))
        text = (
            f"{len(same)} pairs of images in different splits look like the same specimen; if they "
            "are, list them in specimens.csv and keep each specimen in one split"
        )
        yield _about("warning", paths, folder, text)


def _check_region(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Decide the region; a region that cannot be, and defects that it leaves out."""
    settings = diagnosis.settings
    try:
        region = decide_region([each.facts.size for each in diagnosis.images], settings)
    except AlmrrError as error:
        yield Finding("error", str(error).rstrip("."))
        return
    diagnosis.region = region
    masks = [each.item.mask for each in diagnosis.images if each.mask and each.mask.regions]
    outside = [mask for mask in masks if region and mask and is_outside(mask, region, settings)]
    if outside:
        text = "all of its defects are outside of data.region: its image counts as normal"
        yield _about("warning", outside, diagnosis.account.folder, text)


def _check_size(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Regions that next to vanish at the network's input, with a size or tiles that keep them."""
    rows, columns = diagnosis.settings.image_size
    areas, shrunk, paths = [], [], []
    for each in diagnosis.images:
        height, width = each.facts.size
        regions = each.mask.regions if each.mask else ()
        scaled = [area * rows * columns / (height * width) for area in regions]
        areas += list(regions)
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
