"""The factory's question: how many defects are missed, and how many good parts are stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from almrr_pipeline.evaluation.thresholds import proportion
from almrr_pipeline.reporting.tables import (
    DASH,
    Cell,
    Head,
    Metrics,
    Row,
    Table,
    format_fraction,
    show_proportion,
)

Headline = tuple[str, str, str]  # name, value and small print
_EVENTS = {"image": "called defective", "pixel": "shown with an outline"}


def list_verdict_headlines(metrics: Sequence[Metrics], *, repeated: bool = False) -> list[Headline]:
    """Return missed defects and stopped good parts, counted over all runs that have a threshold.

    The interval is Clopper and Pearson's; over several categories, whose rates differ, it is
    a little too wide. If the runs are `repeated`, which is several seeds on the same images, there
    is none.
    """
    images = [values.get("thresholds", {}).get("image", {}) for values in metrics]
    found = [_missed(image["detections"]) for image in images if "detections" in image]
    stopped = [image["false_alarms"] for image in images if "false_alarms" in image]
    return [
        _headline("Missed defects", "defective", found, repeated),
        _headline("Good parts stopped", "normal", stopped, repeated),
    ]


def tabulate_verdicts(metrics: Mapping[str, Metrics], links: Mapping[str, str]) -> Table:
    """Tabulate, by label, the verdicts at the threshold that validation images have chosen."""
    heads = [
        Head("missed", "defective images", "Fraction that scores no higher than the threshold."),
        Head("stopped", "normal images", "Fraction that scores above the threshold."),
        Head("promised", "normal images", "Rate that the validation images guarantee."),
        Head("threshold", meaning="Images that score above it are called defective."),
    ]
    table = Table("Verdicts at the chosen threshold", heads)
    for label, values in metrics.items():
        threshold = values.get("thresholds", {}).get("image", {})
        if "detections" in threshold:
            broken = describe_broken_promise(threshold, "image")
            promised = threshold["guaranteed_rate"]
            cells = [
                show_proportion(_missed(threshold["detections"])),
                show_proportion(threshold["false_alarms"]),
                Cell(DASH)
                if promised is None
                else Cell(
                    f"at most {format_fraction(promised)}",
                    "refuted by the test images" if broken else "",
                ),
                Cell(f"{threshold['value']:.4g}"),
            ]
        else:
            reason = threshold.get("undefined") or "no threshold"
            cells = [Cell(DASH, note=table.mark(reason)), *[Cell(DASH)] * 3]
        table.rows.append(Row(label, cells, link=links.get(label, "")))
    return table


def list_broken_promises(metrics: Mapping[str, Metrics]) -> list[str]:
    """Sentences on each guaranteed rate that is below the interval of the measured one."""
    found = []
    for label, values in metrics.items():
        for of, threshold in values.get("thresholds", {}).items():
            if sentence := describe_broken_promise(threshold, of):
                found.append(f"{label}: {sentence}")
    return found


def describe_broken_promise(threshold: Metrics, of: str) -> str:
    """Say that the test set refutes a threshold's guarantee, and why it may be; empty if not.

    The chance is that of the guarantee's own assumption, that validation and test images are
    exchangeable: the number of false alarms is then beta-binomial (Vovk, "Conditional validity of
    inductive conformal predictors", ACML 2012).

    Args:
        threshold: an entry of `thresholds` in metrics.json.
        of: image or pixel.
    """
    promised, alarms = threshold.get("guaranteed_rate"), threshold.get("false_alarms", {})
    if promised is None or alarms.get("low") is None or alarms["low"] <= promised:
        return ""
    from scipy.stats import betabinom  # slow to import, and seldom needed

    normals, count, total = threshold["normals"], alarms["count"], alarms["of"]
    above = round(promised * (normals + 1))
    chance = float(betabinom.sf(count - 1, total, above, normals + 1 - above))
    rate, low, high = (format_fraction(alarms[name]) for name in ("rate", "low", "high"))
    return (
        "the test images refute the promised false-alarm rate. "
        f"At most {format_fraction(promised)} of normal images should be {_EVENTS[of]}; "
        f"{count} of {total} are ({rate}, 95 % interval {low} to {high}). "
        f"The promise is an average over the choice of the {normals} validation images: if test "
        "images were like them, so many false alarms or more would come with a chance of "
        f"{format_fraction(chance)}. It does not hold where they differ, as with another specimen, "
        "batch, light or camera. Calibrate with normal images of the production that the model is "
        "to judge."
    )


def _missed(detections: Metrics) -> dict[str, Any]:
    """The complement of a proportion."""
    rate, low, high = detections["rate"], detections["low"], detections["high"]
    turned = [None if value is None else 1.0 - value for value in (rate, high, low)]
    count = detections["of"] - detections["count"]
    return dict(zip(("rate", "low", "high"), turned, strict=True)) | {
        "count": count,
        "of": detections["of"],
    }


def _headline(name: str, label: str, proportions: Sequence[Metrics], repeated: bool) -> Headline:
    count, total = (sum(one[key] for one in proportions) for key in ("count", "of"))
    if not total:
        return name, DASH, f"no {label} test image, or no threshold"
    small = f"{count} of {total} {label} test images"
    pooled = proportion(np.arange(total) < count)
    if pooled.low is not None and pooled.high is not None and not repeated:
        small += f"; 95 % interval {100 * pooled.low:.1f} to {100 * pooled.high:.1f} %"
    return name, f"{100 * count / total:.1f} %", small
