"""Numbers of record as tables to be read: columns in groups, intervals in small print, a reason for each gap."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Metrics = Mapping[str, Any]
"""The content of a category's metrics.json; docs/metrics.md says what each entry means."""
Spread = Mapping[str, Mapping[str, float | int | None]]
"""By metric: mean, and over how much it was taken; see almrr_pipeline.evaluation.summary."""

DASH = "\N{EN DASH}"
_NAMES = {
    "image_auroc": ("images", "AUROC"),
    "image_ap": ("images", "AP"),
    "image_f1max": ("images", "F1-max"),
    "pixel_auroc": ("pixels", "AUROC"),
    "pixel_ap": ("pixels", "AP"),
    "pixel_f1max": ("pixels", "F1-max"),
}
_AUPRO = re.compile(r"aupro_(\d+)(?:_(\d+))?")


@dataclass(frozen=True)
class Head:
    """A column's head: its words, the group it stands under, and what it means."""

    text: str
    group: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Cell:
    """One entry: its words, small print below them, the letter of a footnote, and whether it leads its column."""

    text: str
    small: str = ""
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A row: its head and cells; a summary stands apart from the rows above it."""

    head: str
    cells: Sequence[Cell]
    summary: bool = False
    link: str = ""


@dataclass
class Table:
    """A table with its caption and footnotes."""

    caption: str
    heads: Sequence[Head]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def mark(self, reason: str) -> str:
        """Letter of the footnote with this reason, added if it is new: a, b, ... z, aa, ab, ..."""
        if reason not in self.notes:
            self.notes.append(reason)
        number, letters = self.notes.index(reason), ""
        while number >= 0:
            number, letter = divmod(number, 26)
            letters, number = chr(ord("a") + letter) + letters, number - 1
        return letters

    def groups(self) -> list[tuple[str, int]]:
        """Groups of neighboring columns with their widths, for the row above the heads."""
        groups: list[tuple[str, int]] = []
        for head in self.heads:
            if groups and groups[-1][0] == head.group:
                groups[-1] = (head.group, groups[-1][1] + 1)
            else:
                groups.append((head.group, 1))
        return groups


def list_metrics(metrics: Sequence[Metrics]) -> list[str]:
    """Names of the metrics that tables show, in their order: of images, of pixels, of regions."""
    regions = {name: None for values in metrics for name in values if _AUPRO.fullmatch(name)}
    return [*_NAMES, *regions]


def describe_metric(name: str) -> Head:
    """Head of a metric's column."""
    region = _AUPRO.fullmatch(name)
    if region is None:
        group, text = _NAMES[name]
        return Head(text, group, _MEANINGS[name])
    percent = str(int(region[1])) + (f".{region[2]}" if region[2] else "")
    return Head(f"AUPRO {percent} %", "regions", f"{_AUPRO_MEANING} from 0 to {percent} %.")


def tabulate_results(metrics: Mapping[str, Metrics], summary: Spread, *, links: Mapping[str, str]) -> Table:
    """Metrics of record, a row a category, and their mean.

    Args:
        metrics: content of metrics.json by category.
        summary: means over the categories; left out where there is one category.
        links: where on the page each category stands.
    """
    names = list_metrics(list(metrics.values()))
    share = Head("defective", "pixels", "Share of defective pixels: the pixel AP of a map that knows nothing.")
    heads = [*map(describe_metric, names)]
    last = max(k for k, head in enumerate(heads) if head.group == "pixels") + 1
    table = Table("Metrics on the test set", [*heads[:last], share, *heads[last:]])
    tops = _find_tops(metrics, names) if len(metrics) > 1 else {}
    for category, values in metrics.items():
        cells = [_metric_cell(table, values, name, top=tops.get(name)) for name in names]
        cells.insert(last, Cell(format_share(values.get("pixel_defective_share"))))
        table.rows.append(Row(category, cells, link=links.get(category, "")))
    if len(metrics) > 1:
        means = [_mean_cell(summary.get(name, {})) for name in names]
        means.insert(last, Cell(""))
        table.rows.append(Row("mean", means, summary=True))
    return table


def tabulate_defects(metrics: Metrics) -> Table:
    """Metrics of each defect type against all normal test images."""
    kinds: Mapping[str, Metrics] = metrics.get("defects", {})
    names = list_metrics(list(kinds.values()))
    table = Table(
        "By defect type, against all normal test images", [Head("images"), *map(describe_metric, names)]
    )
    for kind, values in kinds.items():
        count = Cell(format_count(values.get("counts", {}).get("defective_images")))
        table.rows.append(Row(kind, [count, *(_metric_cell(table, values, name) for name in names)]))
    return table


def tabulate_seeds(seeds: Mapping[str, Spread]) -> Table:
    """Mean and standard deviation of each metric over the seeds of a data set; only of those that have several."""
    repeated = {name: spread for name, spread in seeds.items() if any((s["seeds"] or 0) > 1 for s in spread.values())}
    names = list_metrics(list(repeated.values()))
    table = Table("Over seeds: mean ± standard deviation", [Head("seeds"), *map(describe_metric, names)])
    for data_set, spread in repeated.items():
        runs = max((int(values["seeds"] or 0) for values in spread.values()), default=0)
        cells = [_spread_cell(spread.get(name, {})) for name in names]
        table.rows.append(Row(data_set, [Cell(str(runs)), *cells]))
    return table


def tabulate_counts(training: Mapping[str, tuple[int | None, int | None]], metrics: Mapping[str, Metrics]) -> Table:
    """Images in each part of each category.

    Args:
        training: by category, normal images trained on and held out for the thresholds; None where not known.
        metrics: content of metrics.json by category.
    """
    heads = [Head("trained on", "normal images"), Head("held out", "normal images")]
    heads += [Head("normal", "test images"), Head("defective", "test images"), Head("regions", "test images")]
    table = Table("Images in each part", heads)
    for category, values in metrics.items():
        counts = values.get("counts", {})
        parts = [*training[category], *(counts.get(k) for k in ("normal_images", "defective_images", "regions"))]
        cells = [Cell(format_count(count)) for count in parts]
        absent = _say_absent(counts)
        if absent:
            cells[3] = Cell(cells[3].text, note=table.mark(absent))
        table.rows.append(Row(category, cells))
    return table


def tabulate_thresholds(metrics: Mapping[str, Metrics]) -> Table:
    """Thresholds with their promise and the rates they had on the test set."""
    heads = [
        Head("level"),
        Head("threshold"),
        Head("asked for", "false alarms", "The false-alarm rate that the threshold was to keep."),
        Head("guaranteed", "false alarms", "The rate that the validation images can guarantee."),
        Head("on the test set", "false alarms", "Share of normal test images above the threshold."),
        Head("images found", "defects on the test set", "Share of defective test images above the threshold."),
        Head("pixels found", "defects on the test set", "Share of defective pixels above the threshold."),
    ]
    table = Table("Thresholds, from validation images alone", heads)
    for category, values in metrics.items():
        for level in ("image", "pixel"):
            threshold = values.get("thresholds", {}).get(level)
            if threshold is not None:
                table.rows.append(Row(category, _threshold_cells(table, level, threshold)))
    return table


def tabulate_oracle(metrics: Mapping[str, Metrics]) -> Table:
    """What choices made on the test set would have given; no rows unless they were asked for."""
    names = list({name: None for values in metrics.values() for name in values if name.startswith("oracle_")})
    table = Table("Chosen on the test set: upper bounds, not results", [Head(n.replace("_", " ")) for n in names])
    if names:
        for category, values in metrics.items():
            table.rows.append(Row(category, [Cell(format_metric(values.get(name))) for name in names]))
    return table


def format_metric(value: float | None) -> str:
    """A metric in [0, 1] with three decimals; a dash where it is undefined."""
    return DASH if value is None else f"{value:.3f}"


def format_share(value: float | None) -> str:
    """A share in percent with two significant digits; a dash where it is undefined."""
    return DASH if value is None else f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"


def format_count(value: int | None) -> str:
    """A whole number in groups of three digits; a dash where it is not known."""
    return DASH if value is None else f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


_AUPRO_MEANING = "Mean share of a defective region that is covered, averaged over false positive rates"
_MEANINGS = {
    "image_auroc": "Chance that a defective image scores higher than a normal one; 0.5 is guessing.",
    "image_ap": "Average precision when images are called defective in the order of their scores.",
    "image_f1max": "Best F1 of any threshold on the image score, chosen with the labels: a bound, not a promise.",
    "pixel_auroc": "Chance that a defective pixel has a higher value than a normal one; 0.5 is guessing.",
    "pixel_ap": "Average precision over all pixels of all test images; guessing gives the share of defective pixels.",
    "pixel_f1max": "Best F1 of any threshold on the anomaly map, chosen with the masks: a bound, not a promise.",
}


def _metric_cell(table: Table, values: Metrics, name: str, top: str | None = None) -> Cell:
    value = values.get(name)
    if value is None:
        return Cell(DASH, note=table.mark(values.get("undefined", {}).get(name, "not computed")))
    interval = values.get("intervals", {}).get(name)
    small = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    return Cell(format_metric(value), small, best=format_metric(value) == top)


def _mean_cell(mean: Mapping[str, float | int | None]) -> Cell:
    value, defined, of = mean.get("mean"), mean.get("categories"), mean.get("of")
    return Cell(format_metric(value), f"{defined} of {of}" if value is not None and defined != of else "")


def _spread_cell(spread: Mapping[str, float | int | None]) -> Cell:
    value, std = spread.get("mean"), spread.get("std")
    return Cell(format_metric(value), "" if std is None else f"± {std:.3f}")


def _find_tops(metrics: Mapping[str, Metrics], names: Sequence[str]) -> dict[str, str]:
    """The highest value of each column, as it is printed."""
    values = {name: [of[name] for of in metrics.values() if of.get(name) is not None] for name in names}
    return {name: format_metric(max(found)) for name, found in values.items() if found}


def _say_absent(counts: Mapping[str, int]) -> str:
    """Which defective test images take no part in the pixel metrics, and why; empty where all do."""
    without, empty = counts.get("defective_images_without_mask", 0), counts.get("defective_images_with_empty_mask", 0)
    parts = [f"{without} without a mask"] * bool(without) + [f"{empty} with an empty mask"] * bool(empty)
    return f"of these, {' and '.join(parts)}" if parts else ""


def _threshold_cells(table: Table, level: str, threshold: Metrics) -> list[Cell]:
    if threshold.get("value") is None:
        reason = threshold.get("undefined") or "no threshold"
        return [Cell(level), Cell(DASH, note=table.mark(reason)), *[Cell(DASH)] * 5]
    return [
        Cell(level),
        Cell(f"{threshold['value']:.4g}", note=table.mark(threshold["guarantee"])),
        Cell(format_share(threshold["rate"])),
        Cell(format_share(threshold["guaranteed_rate"]), f"{threshold['normals']} held out"),
        _proportion_cell(threshold["false_alarms"]),
        _proportion_cell(threshold["detections"]),
        Cell(format_share(threshold.get("defective_pixels_outlined")) if level == "pixel" else ""),
    ]


def _proportion_cell(proportion: Metrics) -> Cell:
    """A counted share, with its 95 % interval in small print."""
    if proportion["rate"] is None:
        return Cell(DASH, "no such image")
    low, high = 100 * proportion["low"], 100 * proportion["high"]
    counted = f"{proportion['count']} of {proportion['of']}"
    return Cell(f"{100 * proportion['rate']:.1f} %", f"{counted}, {low:.1f} to {high:.1f} %")
