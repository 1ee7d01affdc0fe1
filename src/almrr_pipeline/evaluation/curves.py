"""Ranking curves (ROC, precision over recall, per-region overlap) as counts at falling levels, and their figures.

A curve is held at the levels that *defective* units have. Between two such levels only normal units fall below the
level, so that the hit rate stands still: with the number of normal units just above a level and at it, nothing of the
curve is lost, and every figure here is exact, ties included.

Equal to scikit-learn's `roc_auc_score`, `average_precision_score` and the best F1 of `precision_recall_curve`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64] | npt.NDArray[np.float64]

ROC_COLUMNS = ("fpr", "tpr", "level")
PR_COLUMNS = ("recall", "precision", "level")
PRO_COLUMNS = ("fpr", "pro")
CURVE_POINTS = 1000
"""Largest number of rows in a curve that is written to a file."""


@dataclass(frozen=True)
class Curve:
    """Counts at K falling levels; leading axes, if any, are resamplings that share the levels.

    Attributes:
        level: score levels, strictly falling, shape (K,).
        true: defective units whose score is at least the level, shape (..., K).
        false: normal units whose score is at least the level, shape (..., K).
        false_before: normal units that come before any defective unit of this level, shape (..., K): those above it.
        defective: all defective units, shape (...).
        normal: all normal units, shape (...).
        overlap: mean over the defective regions of the share of the region that is at least the level,
            in [0, 1], shape (..., K); None where the units are not pixels.
    """

    level: npt.NDArray[np.floating]
    true: Counts
    false: Counts
    false_before: Counts
    defective: Counts
    normal: Counts
    overlap: Floats | None = None


def trace_curve(
    scores: npt.NDArray[np.floating], labels: npt.NDArray[np.bool_], weights: npt.NDArray[np.int64] | None = None
) -> Curve:
    """Build the curve of few units, such as images.

    Args:
        scores: finite, larger is more anomalous, shape (n,).
        labels: True where defective, shape (n,).
        weights: how often each unit counts, one row a resampling, shape (B, n); once each if None.

    Returns:
        A curve at the distinct scores; its counts have the shape (K,), or (B, K) with weights.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, defective = scores[order], labels[order]
    last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # the last unit of each distinct score
    weight = np.ones(len(scores), np.int64) if weights is None else weights[..., order]
    true: Counts = np.cumsum(np.where(defective, weight, 0), axis=-1)[..., last]
    false: Counts = np.cumsum(np.where(defective, 0, weight), axis=-1)[..., last]
    return Curve(ranked[last], true, false, shift(false), defective=true[..., -1], normal=false[..., -1])


def shift(counts: Counts) -> Counts:
    """The count at the level before; 0 before the first. Shape (..., K) in and out."""
    before = np.zeros_like(counts)
    before[..., 1:] = counts[..., :-1]
    return before


def auroc(curve: Curve) -> Floats:
    """Area under the ROC curve: the chance that a defective unit scores above a normal one, ties counted half.

    Mann and Whitney (1947). In [0, 1], shape (...); nan where there is no normal or no defective unit.
    """
    gained = curve.true - shift(curve.true)
    below = curve.normal[..., None] - (curve.false + curve.false_before) / 2.0
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((gained * below).sum(axis=-1) / curve.defective / curve.normal)


def average_precision(curve: Curve) -> Floats:
    """Average precision: precision summed over the steps of recall, without interpolation.

    In [0, 1], shape (...); nan where there is no defective unit.
    """
    gained = curve.true - shift(curve.true)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((gained * _precision(curve.true, curve.false)).sum(axis=-1) / curve.defective)


def f1_max(curve: Curve) -> Floats:
    """Best F1 over all thresholds; the threshold is chosen on the very units that are scored, so it decides nothing.

    In [0, 1], shape (...); nan where there is no defective unit.
    """
    return np.where(curve.defective > 0, _f1(curve).max(axis=-1), np.nan)


def best_f1_level(curve: Curve) -> float:
    """The level of the best F1 (the highest of several), known only to who has seen the labels; for shape (K,)."""
    return float(curve.level[int(np.argmax(_f1(curve)))])


def tabulate_roc(curve: Curve) -> pd.DataFrame:
    """ROC curve for plotting, at most CURVE_POINTS rows: fpr, tpr in [0, 1], and the lowest score that is an alarm.

    The level is nan at the two ends (no alarm, all alarms), which need none.
    """
    true, false, level = _vertices(curve)
    return _thinned(ROC_COLUMNS, false / curve.normal, true / curve.defective, level)


def tabulate_pr(curve: Curve) -> pd.DataFrame:
    """Precision over recall for plotting, with the level as in `tabulate_roc`; precision is 1 before any alarm."""
    true, false, level = _vertices(curve)
    precision = np.where(true + false == 0, 1.0, _precision(true, false))
    return _thinned(PR_COLUMNS, true / curve.defective, precision, level)


def tabulate_pro(curve: Curve, limit: float) -> pd.DataFrame:
    """Per-region overlap over false positive rate for plotting: fpr in [0, limit], pro in [0, 1]."""
    assert curve.overlap is not None, "only pixels have regions"
    _, false, _ = _vertices(curve)
    overlap = _interleaved(shift(curve.overlap), curve.overlap)
    fpr, pro = false / curve.normal, np.concatenate([[0.0], overlap, [1.0]])
    inside = fpr < limit
    fpr, pro = np.append(fpr[inside], limit), np.append(pro[inside], np.interp(limit, fpr, pro))
    return _thinned(PRO_COLUMNS, fpr, pro, scale=limit)


def thin(x: Floats, y: Floats, points: int) -> npt.NDArray[np.intp]:
    """Choose vertices that keep the drawing: evenly along the curve's length |dx| + |dy|, both ends included.

    A chosen polyline leaves the full one by at most length / (points - 1).

    Returns:
        Rising indices, at most `points` of them.
    """
    if len(x) <= points:
        return np.arange(len(x))
    path = np.append(0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    chosen = np.searchsorted(path, np.linspace(0.0, path[-1], points - 1))
    return np.unique(np.append(chosen, len(x) - 1))


def _f1(curve: Curve) -> Floats:
    reached = np.asarray(curve.true + curve.false + curve.defective[..., None], dtype=np.float64)
    return np.divide(2.0 * curve.true, reached, out=np.zeros(reached.shape), where=reached > 0)


def _precision(true: Counts, false: Counts) -> Floats:
    """Share of the alarms that are right; 0 where there is none."""
    alarms = true + false
    return np.divide(true, alarms, out=np.zeros(alarms.shape), where=alarms > 0)


def _vertices(curve: Curve) -> tuple[Floats, Floats, Floats]:
    """Corners of the curve (true, false, level), from no alarm to all: just above each level, then at it."""
    just_above = np.nextafter(curve.level, np.asarray(np.inf, curve.level.dtype))
    true = np.concatenate([[0.0], _interleaved(shift(curve.true), curve.true), [curve.defective]])
    false = np.concatenate([[0.0], _interleaved(curve.false_before, curve.false), [curve.normal]])
    level = np.concatenate([[np.nan], _interleaved(just_above, curve.level), [np.nan]])
    return true, false, level


def _interleaved(first: npt.NDArray[np.generic], second: npt.NDArray[np.generic]) -> Floats:
    return np.stack([first, second], axis=-1, dtype=np.float64).reshape(-1)


def _thinned(names: tuple[str, ...], x: Floats, y: Floats, *others: Floats, scale: float = 1.0) -> pd.DataFrame:
    """Table of the vertices that `thin` chooses, x counting in units of `scale`; a vertex met twice stands once."""
    chosen = thin(x / scale, y, CURVE_POINTS)
    table = pd.DataFrame({name: values[chosen] for name, values in zip(names, (x, y, *others), strict=True)})
    return table.drop_duplicates(list(names[:2]), ignore_index=True)
