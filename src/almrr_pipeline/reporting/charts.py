"""Charts of the report as inline SVG, drawn by matplotlib.

Colors are CSS variables of the page with fallbacks for a white one, and text takes the page's font,
so that one drawing serves light and dark themes. Equal numbers give equal bytes: a drawing has no
identifiers, no script and no time stamp. A column that is missing is an AlmrrError.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from almrr_pipeline.common.arrays import Floats
from almrr_pipeline.common.errors import AlmrrError

CurveKind = Literal["roc", "pr", "pro"]
_CURVES: Mapping[CurveKind, tuple[str, str, str, str]] = {
    "roc": ("fpr", "tpr", "false positive rate", "true positive rate"),
    "pr": ("recall", "precision", "recall", "precision"),
    "pro": ("fpr", "pro", "false positive rate", "per-region overlap"),
}

_FILES = Path(__file__).with_name("templates")
_STYLE = _FILES / "report.mplstyle"
_LIGHT_THEME = (_FILES / "report.css").read_text(encoding="utf-8").partition("}")[0]
_VARIABLES = re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]{6});", _LIGHT_THEME)
_INK, _MUTED, _GRID = (dict(_VARIABLES)[name] for name in ("--ink", "--muted", "--grid"))
_PALETTE = sum(name.startswith("--series-") for name, _ in _VARIABLES)  # colors of curves
_DASHES: Sequence[Any] = ("-", (0, (6, 3)), (0, (2, 2.5)), (0, (8, 3, 2, 3)))  # a palette's round
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 20, 10, 42  # margins around the axes, in pixels
_LEGEND_ROW = 15.4  # pixels, of matplotlib's legends in this font size
_CHARACTER = 6.6  # mean width of a character of the legend, in pixels
_TITLE = "title:"  # identifiers of matplotlib's artists that become tooltips begin with it
_COLUMNS = 240  # groups of steps that a loss curve is summed up in: about two pixels each
_BINS = 32  # of the histogram of scores


def draw_curves(
    kind: CurveKind, curves: Mapping[str, pd.DataFrame], *, title: str, limit: float | None = None
) -> str:
    """Draw the curves of all categories in one frame, with a legend below, as an SVG element.

    Args:
        kind: roc (columns fpr, tpr), pr (recall, precision) or pro (fpr, pro), all in [0, 1].
        curves: points by label, in the curve's order. What has no points is left out; the others
            keep their colors, so that a category looks the same in every figure.
        title: what the drawing shows, for screen readers.
        limit: right end of the false positive rate; 1 if None.
    """
    x_name, y_name, x_label, y_label = _CURVES[kind]
    right = 1.0 if limit is None else limit
    with matplotlib.rc_context(fname=_STYLE):
        axes = _frame((0.0, right), (0.0, 1.0), x_label, y_label)
        if kind == "roc":  # of guessing
            axes.plot([0.0, right], [0.0, right], color=_GRID, linewidth=1.0, linestyle=(0, (3, 3)))
        for place, (name, points) in enumerate(curves.items()):
            if len(points):
                _need_columns(points, (x_name, y_name), f"The {kind} curve of {name}")
                dash = _DASHES[place // _PALETTE % len(_DASHES)]
                x, y = np.clip(points[x_name], 0.0, right), np.clip(points[y_name], 0.0, 1.0)
                _plot(axes, x, y, f"C{place}", name, linestyle=dash)
        return _to_svg(axes, title, width=360, height=300)


def draw_losses(history: pd.DataFrame, *, title: str) -> str:
    """Draw the losses over the steps on a logarithmic scale: the running mean and its range.

    The learning rate is a thin line on its own scale; its largest value, which the legend names, is
    at the top. Without a positive loss the frame is empty.

    Args:
        history: columns step, loss, and where they exist reconstruction, refinement, learning_rate.
        title: what the drawing shows, for screen readers.
    """
    _need_columns(history, ("step", "loss"), "The training history")
    names = [name for name in ("loss", "reconstruction", "refinement") if name in history]
    values, steps = history[names].to_numpy(np.float64), history["step"].to_numpy(np.float64)
    drawn = np.isfinite(values) & (values > 0)  # what has a logarithm
    last, limits = max(1.0, steps.max(initial=1.0)), _log_limits(values[drawn])
    with matplotlib.rc_context(fname=_STYLE):
        axes = _frame((0.0, last), limits, "step", "loss", log=True)
        for place, name in enumerate(names):
            usable = drawn[:, place]
            value = np.clip(values[usable, place], *limits)
            _plot_band(axes, steps[usable], value, last, f"C{place}", name)
        rate = history.get("learning_rate", pd.Series(dtype=float)).to_numpy(np.float64)
        if (top := np.nanmax(rate, initial=0.0)) > 0:
            style = {"label": f"learning rate, up to {top:.2g}", "linestyle": _DASHES[2]}
            style["transform"] = axes.get_xaxis_transform()  # y from 0 to 1 over the axes' height
            _plot(axes, steps, rate / top, _MUTED, "learning rate", linewidth=1.0, **style)
        return _to_svg(axes, title, width=480, height=300)


def draw_scores(scores: pd.DataFrame, *, threshold: float | None, title: str) -> str:
    """Draw histograms of the scores of normal and of defective images, and the image threshold.

    Bars are fractions of their own class, so that classes of different size can be compared.

    Args:
        scores: columns label (normal | defective) and score.
        threshold: image threshold; None draws no line.
        title: what the drawing shows, for screen readers.
    """
    _need_columns(scores, ("label", "score"), "The table of scores")
    finite = scores[np.isfinite(scores["score"].astype(float))]
    ends = [*finite["score"], *([] if threshold is None else [threshold])] or [0.0, 1.0]
    margin = 0.02 * (max(ends) - min(ends)) or 0.5
    edges = np.linspace(min(ends) - margin, max(ends) + margin, _BINS + 1)
    percent = {}
    for label in ("normal", "defective"):
        counts, _ = np.histogram(finite.loc[finite["label"] == label, "score"], edges)
        percent[label] = 100 * counts / max(1, counts.sum())
    top = 1.05 * (max(bars.max() for bars in percent.values()) or 100.0)
    with matplotlib.rc_context(fname=_STYLE):
        x_limits = (edges[0], edges[-1])
        axes = _frame(x_limits, (0.0, top), "anomaly score", "fraction of its class, %")
        for place, (label, bars) in enumerate(percent.items()):
            if bars.any():
                axes.stairs(
                    np.where(bars > 0, bars, np.nan),  # empty bins have no outline
                    edges,
                    fill=True,
                    facecolor=(f"C{place}", 0.28),
                    edgecolor=f"C{place}",
                    linewidth=1.2,
                    label=f"{label} ({(scores['label'] == label).sum()})",
                    gid=_TITLE + label,
                )
        if threshold is not None:
            style = {"label": f"threshold {threshold:.3g}", "linestyle": (0, (5, 3))}
            name = f"threshold {threshold:.4g}"
            _plot(axes, [threshold] * 2, [0.0, top], _INK, name, linewidth=1.2, **style)
        return _to_svg(axes, title, width=480, height=260)


def _need_columns(table: pd.DataFrame, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if name not in table]
    if missing:
        raise AlmrrError(
            f"{what} lacks the column(s) {', '.join(missing)}; run the stage that writes it again."
        )


def _log_limits(values: Floats) -> tuple[float, float]:
    """Ends of a logarithmic axis: 1, 2 or 5 times a power of ten on both sides of the values."""
    steps = np.outer(10.0 ** np.arange(-12, 13), (1, 2, 5)).ravel()
    low, high = (values.min(), values.max()) if values.size else (0.1, 0.9)
    first, last = np.searchsorted(steps, [low, high], side="right")
    return float(steps[max(first - 1, 0)]), float(steps[min(max(last, 1), len(steps) - 1)])


def _frame(
    x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str, *, log: bool = False
) -> Axes:
    axes = Figure(frameon=False).add_axes((0, 0, 1, 1), frameon=False)
    axes.set_yscale("log" if log else "linear")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter("{x:.6g}")
    if log:
        subs = (1.0, 2.0, 5.0) if y[1] / y[0] < 1e3 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlim=x, ylim=y, xlabel=x_label, ylabel=y_label)
    return axes


def _plot(
    axes: Axes, x: npt.ArrayLike, y: npt.ArrayLike, color: str, name: str, **style: object
) -> None:
    """Plot a line with its name as tooltip, and as label of the legend if there is no other."""
    options: dict[str, Any] = {"label": name, "linewidth": 1.8, **style}
    axes.plot(x, y, color=color, gid=_TITLE + name, **options)


def _plot_band(
    axes: Axes, steps: Floats, values: Floats, last: float, color: str, name: str
) -> None:
    """Plot a noisy curve as its mean and its range in each group of neighboring steps."""
    groups = pd.DataFrame({"step": steps, "value": values}).groupby(steps * _COLUMNS // last)
    step, value = groups["step"].mean(), groups["value"].agg(["min", "max", "mean"])
    around = np.append(step, step[::-1]), np.append(value["max"], value["min"][::-1])
    axes.fill(*around, facecolor=color, alpha=0.16, linewidth=0)
    _plot(axes, step, value["mean"], color, name, linewidth=1.6)


def _to_svg(axes: Axes, title: str, *, width: int, height: int) -> str:
    """Put the axes and a legend below them at their places, and return the SVG element."""
    handles, labels = axes.get_legend_handles_labels()
    columns = int((width - _LEFT) // (38 + _CHARACTER * max(map(len, labels), default=1)))
    rows = -(-len(labels) // max(columns, 1))
    total = round(height + (rows + 0.4) * _LEGEND_ROW) if rows else height
    across, up = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    place = (_LEFT / width, 1 - (_TOP + up) / total, across / width, up / total)
    axes.set_position(place)
    axes.xaxis.set_label_coords(0.5, -24 / up)
    axes.yaxis.set_label_coords(-34 / across, 0.5)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(width / 72, total / 72)  # SVG has 72 pixels per inch
    corner = (place[0], 1 - height / total)
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=corner, ncols=max(columns, 1))
    stream, unnamed = io.BytesIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=unnamed)
    root = ElementTree.fromstring(stream.getvalue())
    for element in list(root.iter()):
        _make_inline(element)
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "role": "img",
        "aria-label": title,
        "viewBox": f"0 0 {width} {total}",
        "style": f"font:11px system-ui,sans-serif;fill:var(--muted,{_MUTED});stroke-linejoin:round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _make_inline(element: ElementTree.Element) -> None:
    """Bring an element of matplotlib's SVG into the page's terms: short, themed, no identifiers."""
    element.tag = element.tag.rpartition("}")[2]
    for child in element.findall("{*}defs"):
        element.remove(child)
    attributes = element.attrib
    element.tail = None
    if element.tag == "text":
        attributes["style"] = re.sub(r"(font|fill)[^;]*;? ?", "", attributes["style"])  # the root's
        if attributes["transform"].startswith("rotate(-0 "):
            del attributes["transform"]
    else:
        element.text = None
    attributes.pop("clip-path", None)  # data are within the limits
    name = attributes.pop("id", "")
    if name.startswith(_TITLE):
        ElementTree.SubElement(element, "title").text = name.removeprefix(_TITLE)
    for key in attributes.keys() & {"d", "x", "y", "transform"}:
        short = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}", attributes[key])
        attributes[key] = re.sub(r"\.0\b|(?<=[MLz]) | +(?=[MLz ]|$)", "", short)
    if "style" in attributes:
        themed = attributes["style"]
        for variable, color in _VARIABLES:  # follows the page's theme
            themed = themed.replace(color, f"var({variable},{color})")
        attributes["style"] = re.sub(r"([:;,]) ", r"\1", themed)
