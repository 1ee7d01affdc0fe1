"""Curves as small inline SVG: readable on light and on dark pages, equal bytes for equal numbers.

Colors come from the page's CSS variables (--series-1 and so on, --ink, --grid) with fallbacks for a plain white page,
so that one drawing serves both themes. A drawing holds no identifiers, no scripts, no time stamps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from almrr_pipeline.common.errors import AlmrrError

Floats = npt.NDArray[np.float64]
CurveKind = Literal["roc", "pr", "pro"]

# Okabe and Ito's palette, the yellow darkened: it stays apart for every kind of color vision.
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#b4478e", "#a07800", "#3d8fc4", "#6b5bd2", "#5f6b6d")
_DASHES = ("", "6 3", "2 2.5", "8 3 2 3")
_WIDTH, _HEIGHT = 360.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 20.0, 10.0, 42.0
_LEGEND_ROW = 17.0
_BINS = 32
_COLUMNS = 240
"""Loss curves are summed up in at most so many columns."""
_TOLERANCE = 0.15
"""A curve's vertices may move by this much, in pixels, when points are left out."""


@dataclass(frozen=True)
class Axis:
    """One axis of a plot: its range in data units, its words, and where its ticks are."""

    low: float
    high: float
    label: str
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, values: npt.ArrayLike) -> Floats:
        """Bring data to [0, 1] along the axis; what lies outside ends at the nearer end."""
        data = np.asarray(values, dtype=np.float64)
        low, high = self.low, self.high
        if self.log:
            data, low, high = np.log10(np.maximum(data, self.low)), math.log10(self.low), math.log10(self.high)
        return np.clip((data - low) / (high - low), 0.0, 1.0)


@dataclass(frozen=True)
class Frame:
    """Where a plot's data lie on the drawing."""

    x: Axis
    y: Axis
    width: float = _WIDTH
    height: float = _HEIGHT

    def place(self, x: npt.ArrayLike, y: npt.ArrayLike) -> Floats:
        """Data to drawing coordinates, shape (n, 2), y downwards."""
        across = _LEFT + self.x.place(x) * (self.width - _LEFT - _RIGHT)
        down = self.height - _BOTTOM - self.y.place(y) * (self.height - _TOP - _BOTTOM)
        return np.stack([across, down], axis=-1)


_CURVES: Mapping[CurveKind, tuple[str, str, str, str]] = {
    "roc": ("fpr", "tpr", "false positive rate", "true positive rate"),
    "pr": ("recall", "precision", "recall", "precision"),
    "pro": ("fpr", "pro", "false positive rate", "per-region overlap"),
}


def draw_curves(kind: CurveKind, curves: Mapping[str, pd.DataFrame], *, title: str, limit: float | None = None) -> str:
    """Draw one curve a category in a common frame, with a legend below.

    Args:
        kind: roc (columns fpr, tpr), pr (recall, precision) or pro (fpr, pro); all in [0, 1].
        curves: category to its points, in the curve's order. A category without points is left out; the others keep
            their colors, so that a category looks the same in every figure.
        title: what the drawing shows, for those who cannot see it.
        limit: right end of the false positive rate; 1 if None.

    Returns:
        An SVG element.

    Raises:
        AlmrrError: a column is missing.
    """
    x_name, y_name, x_label, y_label = _CURVES[kind]
    right = 1.0 if limit is None else limit
    frame = Frame(Axis(0.0, right, x_label, _round_ticks(right)), Axis(0.0, 1.0, y_label, _round_ticks(1.0)))
    parts, legend = _draw_frame(frame), []
    if kind == "roc":
        parts.append(_draw_line(frame.place([0.0, right], [0.0, right]), "var(--grid,#d5d8de)", width=1.0, dash="3 3"))
    for place, (name, points) in enumerate(curves.items()):
        _need_columns(points, (x_name, y_name), f"The {kind} curve of {name}")
        if points.empty:
            continue
        vertices = _simplify(frame.place(points[x_name], points[y_name]))
        parts.append(_draw_line(vertices, _series(place), dash=_dash(place), name=name))
        legend.append((name, _series(place), _dash(place)))
    return _wrap(parts, frame, title, legend)


def draw_losses(history: pd.DataFrame, *, title: str) -> str:
    """Draw the losses over the steps on a logarithmic scale: the mean in each column of the drawing and its range.

    The learning rate runs as a thin line of its own scale, its largest value at the top, which the legend names.

    Args:
        history: columns step, loss, and where they exist reconstruction, refinement, learning_rate.
        title: what the drawing shows, for those who cannot see it.

    Returns:
        An SVG element; an empty frame where there is no positive loss.

    Raises:
        AlmrrError: a column is missing.
    """
    _need_columns(history, ("step", "loss"), "The training history")
    names = [name for name in ("loss", "reconstruction", "refinement") if name in history]
    values = history[names].to_numpy(dtype=np.float64)
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.1, 1.0)
    last = float(history["step"].max()) if len(history) else 1.0
    frame = Frame(Axis(0.0, max(last, 1.0), "step", _round_ticks(max(last, 1.0))), _log_axis(low, high), width=480.0)
    parts, legend = _draw_frame(frame), []
    if "learning_rate" in history and history["learning_rate"].max() > 0:
        parts.append(_draw_rate(frame, history))
        legend.append((f"learning rate, up to {history['learning_rate'].max():.2g}", "var(--muted,#6d7480)", "2 2.5"))
    for place, name in enumerate(names):
        parts += _draw_banded(frame, history["step"].to_numpy(np.float64), values[:, place], _series(place), name)
    return _wrap(parts, frame, title, [(n, _series(k), "") for k, n in enumerate(names)] + legend)


def draw_scores(scores: pd.DataFrame, *, threshold: float | None, title: str) -> str:
    """Draw how the scores of normal and of defective images are spread, with the image threshold.

    Bars are shares of their own class, so that classes of different size can be compared.

    Args:
        scores: columns label (normal | defective) and score.
        threshold: image threshold; None draws no line.
        title: what the drawing shows, for those who cannot see it.

    Returns:
        An SVG element.

    Raises:
        AlmrrError: a column is missing.
    """
    _need_columns(scores, ("label", "score"), "The table of scores")
    values = scores["score"].to_numpy(dtype=np.float64)
    low, high = _score_range(values, threshold)
    edges = np.linspace(low, high, _BINS + 1)
    counts = {label: int((scores["label"] == label).sum()) for label in ("normal", "defective")}
    shares = {label: _histogram(values[(scores["label"] == label).to_numpy()], edges) for label in counts}
    top = max(float(share.max()) for share in shares.values()) or 1.0
    frame = Frame(
        Axis(low, high, "anomaly score", _round_ticks(high, low)),
        Axis(0.0, top * 105, "share of its class, %", _round_ticks(top * 105)),
        width=480.0,
        height=260.0,
    )
    parts, legend = _draw_frame(frame), []
    for place, (label, share) in enumerate(shares.items()):
        if counts[label]:
            parts.append(_draw_steps(frame, edges, 100 * share, _series(place), label))
            legend.append((f"{label} ({counts[label]})", _series(place), ""))
    if threshold is not None:
        line = frame.place([threshold, threshold], [0.0, frame.y.high])
        parts.append(_draw_line(line, "var(--ink,#22262e)", width=1.2, dash="5 3", name=f"threshold {threshold:.4g}"))
        legend.append((f"threshold {threshold:.3g}", "var(--ink,#22262e)", "5 3"))
    return _wrap(parts, frame, title, legend)


def _need_columns(table: pd.DataFrame, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if name not in table]
    if missing:
        raise AlmrrError(f"{what} lacks the column(s) {', '.join(missing)}; run the stage that writes it again.")


def _series(place: int) -> str:
    number = place % len(_SERIES)
    return f"var(--series-{number + 1},{_SERIES[number]})"


def _dash(place: int) -> str:
    return _DASHES[place // len(_SERIES) % len(_DASHES)]


def _number(value: float) -> str:
    """A coordinate with one decimal, as short as it goes."""
    text = f"{value:.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"


def _round_ticks(high: float, low: float = 0.0) -> tuple[float, ...]:
    """Four to eight multiples of 1, 2 or 5 times a power of ten between two values."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(step * k for k in range(first, last + 1))


def _log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis for a loss that ends at 1, 2 or 5 times a power of ten on both sides."""
    steps = [factor * 10.0**power for power in range(-12, 13) for factor in (1, 2, 5)]
    bottom = max((step for step in steps if step <= low), default=steps[0])
    top = min((step for step in steps if step >= high and step > bottom), default=steps[-1])
    inside = [step for step in steps if bottom <= step <= top]
    shown = inside if len(inside) <= 7 else [step for step in inside if math.log10(step) == round(math.log10(step))]
    return Axis(bottom, top, "loss", tuple(shown), log=True)


def _score_range(values: Floats, threshold: float | None) -> tuple[float, float]:
    ends = np.append(values[np.isfinite(values)], [] if threshold is None else [threshold])
    low, high = (float(ends.min()), float(ends.max())) if ends.size else (0.0, 1.0)
    margin = 0.02 * (high - low) or 0.5
    return low - margin, high + margin


def _histogram(values: Floats, edges: Floats) -> Floats:
    counts, _ = np.histogram(values[np.isfinite(values)], edges)
    return np.asarray(counts / max(1, counts.sum()))


def _simplify(vertices: Floats) -> Floats:
    """Leave out what the eye cannot see: vertices within a fraction of a pixel of the line through those kept.

    Ramer (1972), Douglas and Peucker (1973), with a stack in place of recursion; shape (n, 2) in and (m, 2) out.
    """
    if len(vertices) < 3:
        return vertices
    kept = np.zeros(len(vertices), dtype=bool)
    kept[[0, -1]] = True
    pending = [(0, len(vertices) - 1)]
    while pending:
        first, last = pending.pop()
        if last - first < 2:
            continue
        chord, inner = vertices[last] - vertices[first], vertices[first + 1 : last] - vertices[first]
        along = np.clip(inner @ chord / max(float(chord @ chord), 1e-12), 0.0, 1.0)
        distance = np.hypot(*(inner - along[:, None] * chord).T)
        farthest = int(distance.argmax())
        if distance[farthest] > _TOLERANCE:
            middle = first + 1 + farthest
            kept[middle] = True
            pending += [(first, middle), (middle, last)]
    return vertices[kept]


def _path(vertices: Floats) -> str:
    return "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in vertices) if len(vertices) else ""


def _draw_line(vertices: Floats, color: str, *, width: float = 1.8, dash: str = "", name: str = "") -> str:
    dashes = f";stroke-dasharray:{dash}" if dash else ""
    title = f"<title>{escape(name)}</title>" if name else ""
    style = f"fill:none;stroke:{color};stroke-width:{width};stroke-linejoin:round{dashes}"
    return f'<path d="{_path(vertices)}" style="{style}">{title}</path>'


def _draw_rate(frame: Frame, history: pd.DataFrame) -> str:
    rates = history["learning_rate"].to_numpy(dtype=np.float64)
    scale = Frame(frame.x, Axis(0.0, float(rates.max()), "", ()), frame.width, frame.height)
    line = _simplify(scale.place(history["step"], rates))
    return _draw_line(line, "var(--muted,#6d7480)", width=1.0, dash="2 2.5", name="learning rate")


def _draw_banded(frame: Frame, steps: Floats, values: Floats, color: str, name: str) -> list[str]:
    """A noisy curve as its mean and range per column; values that a logarithm does not take are left out."""
    usable = np.isfinite(values) & (values > 0)
    if not usable.any():
        return []
    column = np.minimum(np.floor(frame.x.place(steps[usable]) * _COLUMNS), _COLUMNS - 1)
    groups = pd.DataFrame({"step": steps[usable], "value": values[usable]}).groupby(column)
    step, value = groups["step"].mean(), groups["value"].agg(["min", "max", "mean"])
    upper, lower = frame.place(step, value["max"]), frame.place(step, value["min"])
    band = _path(np.concatenate([_simplify(upper), _simplify(lower)[::-1]])) + "Z"
    line = _draw_line(_simplify(frame.place(step, value["mean"])), color, width=1.6, name=name)
    return [f'<path d="{band}" style="fill:{color};fill-opacity:.16"/>', line]


def _draw_steps(frame: Frame, edges: Floats, shares: Floats, color: str, name: str) -> str:
    """A histogram as stepped areas, one for each run of bins that are not empty."""
    filled = np.flatnonzero(np.diff(np.concatenate([[False], shares > 0, [False]])))  # where runs begin and end
    area = ""
    for first, end in filled.reshape(-1, 2):
        across = np.repeat(edges[first : end + 1], 2)
        up = np.concatenate([[0.0], np.repeat(shares[first:end], 2), [0.0]])
        area += _path(_simplify(frame.place(across, up))) + "Z"
    style = f"fill:{color};fill-opacity:.28;stroke:{color};stroke-width:1.2"
    return f'<path d="{area}" style="{style}"><title>{escape(name)}</title></path>'


def _draw_frame(frame: Frame) -> list[str]:
    """Grid lines, tick labels and the axes' names."""
    left, bottom = _LEFT, frame.height - _BOTTOM
    parts = []
    for tick in frame.y.ticks:
        y = frame.place(frame.x.low, tick)[1]
        parts.append(_draw_line(np.array([[left, y], [frame.width - _RIGHT, y]]), "var(--grid,#d5d8de)", width=0.8))
        parts.append(_draw_text(left - 6, y + 3.5, f"{tick:.3g}", anchor="end"))
    for tick in frame.x.ticks:
        x = frame.place(tick, frame.y.low)[0]
        parts.append(_draw_line(np.array([[x, bottom], [x, bottom + 4]]), "var(--grid,#d5d8de)", width=0.8))
        parts.append(_draw_text(x, bottom + 16, f"{tick:.6g}", anchor="middle"))
    parts.append(_draw_text((left + frame.width - _RIGHT) / 2, frame.height - 8, frame.x.label, anchor="middle"))
    parts.append(_draw_text(12, (_TOP + bottom) / 2, frame.y.label, anchor="middle", turned=True))
    return parts


def _draw_text(x: float, y: float, text: str, *, anchor: str, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {_number(x)} {_number(y)})"' if turned else ""
    return f'<text x="{_number(x)}" y="{_number(y)}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _wrap(parts: Sequence[str], frame: Frame, title: str, legend: Sequence[tuple[str, str, str]]) -> str:
    """Put drawing and legend into one SVG element."""
    rows, height = _draw_legend(frame, legend)
    style = "font:11px system-ui,sans-serif;fill:var(--muted,#6d7480)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {_number(frame.width)} {_number(height)}" '
        f'aria-label="{escape(title)}" style="{style}">{"".join([*parts, *rows])}</svg>'
    )


def _draw_legend(frame: Frame, legend: Sequence[tuple[str, str, str]]) -> tuple[list[str], float]:
    """Entries flow in rows below the plot; returns the elements and the height they need in all."""
    rows, x, y = [], _LEFT, frame.height + 8
    for name, color, dash in legend:
        width = 26 + 5.9 * len(name) + 12
        if x > _LEFT and x + width > frame.width:
            x, y = _LEFT, y + _LEGEND_ROW
        rows.append(_draw_line(np.array([[x, y], [x + 20, y]]), color, width=2.2, dash=dash))
        rows.append(_draw_text(x + 26, y + 3.5, name, anchor="start"))
        x += width
    return rows, y + 10 if legend else frame.height
