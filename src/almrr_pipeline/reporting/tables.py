"""Tables of the report: columns in groups, intervals in small print, a footnote for each gap."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from string import ascii_lowercase
from typing import Any

Metrics = Mapping[str, Any]
"""Content of a metrics.json; docs/metrics.md describes each entry."""

DASH = "\N{EN DASH}"
_MEANINGS = {
    "image_auroc": "Probability that a defective image scores above a normal one; guessing: 0.5.",
    "image_ap": "Average precision of the images in the order of their scores.",
    "image_f1max": "Best F1 of any threshold on the image score, chosen with the labels: a bound.",
    "pixel_auroc": "Probability that an anomalous pixel is above a normal one; guessing: 0.5.",
    "pixel_ap": "Average precision of all test pixels; guessing: the fraction of anomalous pixels.",
    "pixel_f1max": "Best F1 of any threshold on the anomaly map, chosen with the masks: a bound.",
}
_TEXTS = {"auroc": "AUROC", "ap": "AP", "f1max": "F1-max"}
_AUPRO = re.compile(r"aupro_(\d+)(?:_(\d+))?")


@dataclass(frozen=True)
class Head:
    """A column's head: its text, the group above it, and its tooltip."""

    text: str
    group: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Cell:
    """One entry: text, small print below it, letter of a footnote, whether it leads its column."""

    text: str
    small: str = ""
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A row; a summary is set apart from the rows above it."""

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
        """Return the letter of the footnote with this reason, a new one if needed: a ... z, aa."""
        if reason not in self.notes:
            self.notes.append(reason)
        number, letters = self.notes.index(reason), ""
        while number >= 0:
            letters = ascii_lowercase[number % 26] + letters
            number = number // 26 - 1
        return letters

    def groups(self) -> list[tuple[str, int]]:
        """Return groups of neighboring columns with their widths, for the row above the heads."""
        by_group = groupby(head.group for head in self.heads)
        return [(group, len(list(columns))) for group, columns in by_group]


def list_metrics(metrics: Collection[Metrics]) -> list[str]:
    """Return the metrics that tables show, in their order: of images, of pixels, of regions."""
    regions = {name: None for values in metrics for name in values if _AUPRO.fullmatch(name)}
    return [*_MEANINGS, *regions]


def describe_metric(name: str) -> Head:
    """Return the head of a metric's column."""
    region = _AUPRO.fullmatch(name)
    if region is None:
        group, _, text = name.partition("_")
        return Head(_TEXTS[text], f"{group}s", _MEANINGS[name])
    percent = str(int(region[1])) + (f".{region[2]}" if region[2] else "")
    meaning = "Mean covered fraction of an anomalous region, over false positive rates from 0 to "
    return Head(f"AUPRO {percent} %", "regions", f"{meaning}{percent} %.")


def tabulate_results(
    metrics: Mapping[str, Metrics], summary: Metrics, *, links: Mapping[str, str]
) -> Table:
    """Tabulate the metrics by label ("category" or "category, seed N"), and their mean.

    The summary is that of `evaluation.summary.summarize`; links are anchors on the page by label.
    """
    names = list_metrics(metrics.values())
    heads, last = list(map(describe_metric, names)), len(_MEANINGS)  # of pixels
    meaning = "Fraction of anomalous pixels: the pixel AP of guessing."
    heads.insert(last, Head("anomalous", "pixels", meaning))
    table = Table("Metrics on the test set", heads)
    for label, values in metrics.items():
        cells = [_metric_cell(table, values, name, metrics.values()) for name in names]
        cells.insert(last, Cell(format_fraction(values.get("pixel_defective_fraction"))))
        table.rows.append(Row(label, cells, link=links.get(label, "")))
    if len(metrics) > 1:
        means = [Cell(*average_metric(summary, name)) for name in names]
        means.insert(last, Cell(""))
        table.rows.append(Row("mean", means, summary=True))
    return table


def tabulate_baselines(summary: Metrics) -> Table:
    """Tabulate ALMRR, memory bank and nearest image; bold is the highest of a category."""
    categories: Mapping[str, Metrics] = summary.get("categories", {})
    names = list_metrics(categories.values())
    twins = [
        Head("normal", "images with a twin", "Normal test images like one of the training."),
        Head("defective", "images with a twin", "Defective test images like one of the training."),
    ]
    table = Table("Beside two baselines", [*map(describe_metric, names), *twins])
    for category, values in categories.items():
        if "memory_bank_image_auroc" not in values:
            continue
        for method in ("ALMRR", "memory bank", "nearest image"):
            prefix = "" if method == "ALMRR" else f"{method.replace(' ', '_')}_"
            cells = [_compared_cell(values, prefix, name) for name in names]
            shares = [values.get(f"{prefix}{of}_with_twin") for of in ("normal", "defective")]
            blind = [Cell("" if share is None else format_fraction(share)) for share in shares]
            table.rows.append(Row(f"{category}, {method}", [*cells, *blind]))
    return table


def _compared_cell(values: Metrics, prefix: str, name: str) -> Cell:
    """A metric of one method, empty if the method does not have it; best of ALMRR and the bank."""
    if f"{prefix}{name}" not in values:
        return Cell("")
    text = format_metric(values[f"{prefix}{name}"])
    rivals = [values[key] for key in (name, f"memory_bank_{name}") if values.get(key) is not None]
    best = prefix != "nearest_image_" and bool(rivals) and text == format_metric(max(rivals))
    return Cell(text, best=best)


def average_metric(summary: Metrics, name: str) -> tuple[str, str]:
    """Return a metric's mean over the categories, and "2 of 3" where not all define it."""
    categories = summary.get("categories", {}).values()
    defined = sum(values.get(name) is not None for values in categories)
    few = defined < len(categories)
    return format_metric(summary.get("mean", {}).get(name)), f"{defined} of {len(categories)}" * few


def tabulate_defect_types(metrics: Metrics, baselines: Metrics | None = None) -> Table:
    """Tabulate the metrics of each defect type against all normal test images.

    With the content of baselines.json the memory bank's are below them; bold is the higher one.
    """
    types: Mapping[str, Metrics] = metrics.get("defect_types", {})
    bank = (baselines or {}).get("memory_bank", {}).get("defect_types", {})
    names = list_metrics(types.values())
    caption = "By defect type, against all normal test images"
    caption += "; below, the memory bank" * bool(bank)
    table = Table(caption, [Head("images"), *map(describe_metric, names)])
    for defect_type, values in types.items():
        count = Cell(format_count(values.get("counts", {}).get("defective_images")))
        cells = [_metric_cell(table, values, name) for name in names]
        for place, name in enumerate(names):
            rival = bank.get(defect_type, {}).get(name)
            if values.get(name) is not None and rival is not None:
                best = cells[place].text >= format_metric(rival)
                cells[place] = replace(cells[place], small=f"bank {rival:.3f}", best=best)
        table.rows.append(Row(defect_type, [count, *cells]))
    return table


def tabulate_seeds(summary: Metrics) -> Table:
    """Tabulate mean and std over the seeds of each category that has two or more."""
    stds: Mapping[str, Metrics] = summary.get("std", {})
    names = list_metrics(stds.values())
    heads = [Head("seeds"), *map(describe_metric, names)]
    table = Table("Over seeds: mean ± standard deviation", heads)
    for category, std in stds.items():
        cells = [Cell(str(len(summary["runs"][category])))]
        for name in names:
            spread = "" if std.get(name) is None else f"± {std[name]:.3f}"
            cells.append(Cell(format_metric(summary["categories"][category].get(name)), spread))
        table.rows.append(Row(category, cells))
    return table


def tabulate_counts(
    training: Mapping[str, tuple[int | None, int | None]], metrics: Mapping[str, Metrics]
) -> Table:
    """Tabulate each category's images: normal ones for (training, validation), and test images."""
    heads = [Head(text, "normal images") for text in ("training", "validation")]
    heads += [Head(text, "test images") for text in ("normal", "defective", "regions")]
    table = Table("Images of each split", heads)
    for category, values in metrics.items():
        counts = values.get("counts", {})
        tested = (counts.get(name) for name in ("normal_images", "defective_images", "regions"))
        cells = [Cell(format_count(count)) for count in (*training[category], *tested)]
        without = {
            "without a mask": counts.get("defective_images_without_mask"),
            "with an empty mask": counts.get("defective_images_with_empty_mask"),
        }
        if absent := [f"{count} {words}" for words, count in without.items() if count]:
            cells[3] = replace(cells[3], note=table.mark(f"of these, {' and '.join(absent)}"))
        table.rows.append(Row(category, cells))
    return table


def tabulate_thresholds(metrics: Mapping[str, Metrics]) -> Table:
    """Tabulate the thresholds with their guarantee and their rates on the test set."""
    alarms, found = "false positives", "found on the test set"
    heads = [
        Head("of"),
        Head("threshold"),
        Head("requested", alarms, "False-alarm rate that the threshold is to keep."),
        Head("guaranteed", alarms, "Rate that the validation images can guarantee."),
        Head("on the test set", alarms, "Fraction of normal test images above the threshold."),
        Head("images", found, "Fraction of defective test images above the threshold."),
        Head("pixels", found, "Fraction of anomalous pixels above the threshold."),
    ]
    table = Table("Thresholds, from validation images alone", heads)
    for label, values in metrics.items():
        for of in ("image", "pixel"):
            threshold = values.get("thresholds", {}).get(of)
            if threshold is not None:
                table.rows.append(Row(label, _threshold_cells(table, of, threshold)))
    return table


def tabulate_oracle(metrics: Mapping[str, Metrics]) -> Table:
    """Tabulate results of choices made on the test set; no rows unless they were requested."""
    every = dict.fromkeys(name for values in metrics.values() for name in values)
    names = [name for name in every if name.startswith("oracle_")]
    rows = [
        Row(label, [Cell(format_metric(values.get(name))) for name in names])
        for label, values in metrics.items()
        if names
    ]
    heads = [Head(name.replace("_", " ")) for name in names]
    return Table("Chosen on the test set: upper bounds, not results", heads, rows)


def show_metric(metrics: Metrics, name: str) -> tuple[str, str, str]:
    """Return a metric, its 95 % interval, and why it is undefined; empty where there is none."""
    interval = metrics.get("intervals", {}).get(name)
    words = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
    reason = metrics.get("undefined", {}).get(name, "")
    return format_metric(metrics.get(name)), words, reason


def format_metric(value: float | None) -> str:
    """Format a metric in [0, 1] with three decimals; a dash where it is undefined."""
    return DASH if value is None else f"{value:.3f}"


def format_fraction(value: float | None) -> str:
    """Format a fraction in percent with two digits; a dash where it is undefined."""
    if value is None:
        return DASH
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"


def format_count(value: int | None) -> str:
    """Format a whole number in groups of three digits; a dash where it is unknown."""
    return DASH if value is None else f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _metric_cell(
    table: Table, values: Metrics, name: str, rivals: Collection[Metrics] = ()
) -> Cell:
    """A metric with its interval; best if no rival, as printed, is higher."""
    text, interval, reason = show_metric(values, name)
    if values.get(name) is None:
        return Cell(text, note=table.mark(reason or "not computed"))
    defined = [rival[name] for rival in rivals if rival.get(name) is not None]
    best = len(rivals) > 1 and text == format_metric(max(defined))
    return Cell(text, interval, best=best)


def _threshold_cells(table: Table, of: str, threshold: Metrics) -> list[Cell]:
    if threshold.get("value") is None:
        reason = threshold.get("undefined") or "no threshold"
        return [Cell(of), Cell(DASH, note=table.mark(reason)), *[Cell(DASH)] * 5]
    pixels = format_fraction(threshold.get("defective_pixels_outlined"))
    return [
        Cell(of),
        Cell(f"{threshold['value']:.4g}", note=table.mark(threshold["guarantee"])),
        Cell(format_fraction(threshold["rate"])),
        Cell(format_fraction(threshold["guaranteed_rate"]), f"{threshold['normals']} images"),
        show_proportion(threshold["false_alarms"]),
        show_proportion(threshold["detections"]),
        Cell(pixels if of == "pixel" else ""),
    ]


def show_proportion(proportion: Metrics) -> Cell:
    """Show a counted fraction in percent, with its counts and its interval."""
    if proportion["rate"] is None:
        return Cell(DASH, "no such image")
    low, high = 100 * proportion["low"], 100 * proportion["high"]
    counted = f"{proportion['count']} of {proportion['of']}"
    return Cell(f"{100 * proportion['rate']:.1f} %", f"{counted}, {low:.1f} to {high:.1f} %")
