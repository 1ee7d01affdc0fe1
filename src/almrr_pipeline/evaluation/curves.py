"""Ranking curves (ROC, precision-recall, per-region overlap) and the metrics computed from them.

A curve holds counts at the distinct scores of the *positives* (defective images, anomalous pixels).
Between two such thresholds only negatives pass, and the true positive rate stays constant: with the
negatives counted both above and at each threshold no corner of the curve is lost, and every metric
is exact, ties included.

The metrics equal scikit-learn's `roc_auc_score`, `average_precision_score` and best F1 of
`precision_recall_curve` up to the last digits (its sums round in another order), and take weights
of many bootstrap resamplings at once, which scikit-learn's do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from almrr_pipeline.common.arrays import Bools, Floats, Indices

Counts = npt.NDArray[np.int64] | npt.NDArray[np.float64]

_COLUMNS = {
    "roc": ("fpr", "tpr", "threshold"),
    "pr": ("recall", "precision", "threshold"),
    "pro": ("fpr", "pro"),
}
CURVE_POINTS = 1000
"""Largest number of rows of a curve that is written to a file; more cannot be seen in a figure."""


@dataclass(frozen=True)
class Curve:
    """Counts at K falling thresholds; leading axes, if any, are resamplings."""

    threshold: npt.NDArray[np.floating]  # scores, strictly falling, shape (K,)
    tp: Counts  # positives whose score is at least the threshold, shape (..., K)
    fp: Counts  # negatives whose score is at least the threshold, shape (..., K)
    fp_above: Counts  # negatives whose score is above the threshold, shape (..., K)
    positives: Counts  # number of positives, shape (...)
    negatives: Counts  # number of negatives, shape (...)
    overlap: Floats | None = None
    """Fraction of an anomalous region that is at least the threshold, in [0, 1], mean over the
    regions, shape (..., K); None unless the units are pixels."""


def trace_curve(
    scores: npt.NDArray[np.floating], labels: Bools, weights: Indices | None = None
) -> Curve:
    """Build the curve, at the distinct scores, of units that are all in memory, such as images.

    Args:
        scores: finite, larger is more anomalous, shape (n,).
        labels: True for positives, shape (n,).
        weights: how often each unit counts in B resamplings, shape (B, n); once each if None. The
            counts have the shape (B, K) with weights, (K,) without.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, positive = scores[order], labels[order]
    last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # last unit of each distinct score
    weight = np.ones(len(scores), np.int64) if weights is None else weights[..., order]
    tp: Counts = np.cumsum(np.where(positive, weight, 0), axis=-1)[..., last]
    fp: Counts = np.cumsum(np.where(positive, 0, weight), axis=-1)[..., last]
    return Curve(ranked[last], tp, fp, previous(fp), positives=tp[..., -1], negatives=fp[..., -1])


def previous(counts: Counts) -> Counts:
    """Counts at the threshold before, 0 before the first; shape (..., K) in and out."""
    before = np.zeros_like(counts)
    before[..., 1:] = counts[..., :-1]
    return before


def auroc(curve: Curve) -> Floats:
    """Area under the ROC curve: probability that a positive scores above a negative, ties half.

    Mann and Whitney (1947). In [0, 1], shape (...); nan without positives or negatives.
    """
    gained = curve.tp - previous(curve.tp)
    below = curve.negatives[..., None] - (curve.fp + curve.fp_above) / 2.0
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((gained * below).sum(axis=-1) / curve.positives / curve.negatives)


def average_precision(curve: Curve) -> Floats:
    """Average precision: precision summed over the steps of recall, without interpolation.

    In [0, 1], shape (...); nan without positives.
    """
    gained = curve.tp - previous(curve.tp)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = _precision(curve.tp, curve.fp)
        return np.asarray((gained * precision).sum(axis=-1) / curve.positives)


def f1_max(curve: Curve) -> Floats:
    """Best F1 over all thresholds; optimistic, as the threshold is chosen on the same units.

    In [0, 1], shape (...); nan without positives.
    """
    return np.where(curve.positives > 0, _f1(curve).max(axis=-1), np.nan)


def best_f1_threshold(curve: Curve) -> float:
    """Threshold of the best F1, the highest of several; for counts of shape (K,)."""
    return float(curve.threshold[int(np.argmax(_f1(curve)))])


def aupro(curve: Curve, limit: float) -> Floats:
    """Area under the per-region overlap curve up to a false positive rate, divided by that rate.

    Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.2.2: the mean over
    the regions (8-connected components of the ground truth) of the fraction that is found, against
    the false positive rate over the normal pixels of all test images; every region counts alike.

    The curve is piecewise linear: horizontal while only normal pixels are added, slanted where
    normal and anomalous pixels are tied. It is integrated exactly; the piece that crosses the limit
    is cut there.
    In [0, 1], shape (...); nan without normal pixels or regions. The limit is in (0, 1].
    """
    assert curve.overlap is not None, "only pixels have regions"
    end = np.asarray(limit * curve.negatives)[..., None]
    low, high = previous(curve.overlap), curve.overlap
    horizontal = np.minimum(curve.fp_above, end) - np.minimum(previous(curve.fp), end)
    slanted = np.asarray(curve.fp - curve.fp_above, dtype=np.float64)
    inside = np.clip(end - curve.fp_above, 0.0, slanted)
    fraction = np.divide(inside, slanted, out=np.zeros(inside.shape), where=slanted > 0)
    area = horizontal * low + inside * (low + (high - low) * fraction / 2.0)
    beyond = np.maximum(end[..., 0] - curve.fp[..., -1], 0.0) * high[..., -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((area.sum(axis=-1) + beyond) / end[..., 0])


def name_aupro(limit: float) -> str:
    """Key in metrics.json: aupro_30 for 0.3, aupro_05 for 0.05, aupro_12_5 for 0.125."""
    whole, _, rest = f"{100.0 * limit:.10g}".partition(".")
    return f"aupro_{whole:0>2}" + (f"_{rest}" if rest else "")


def tabulate_curves(curve: Curve | None, limit: float = 1.0) -> dict[str, pd.DataFrame]:
    """Tables of at most CURVE_POINTS rows, none without a curve; fractions are in [0, 1].

    A score of at least the threshold is an alarm; at both ends (no alarm, all alarms) it is nan.

    Args:
        curve: counts of shape (K,).
        limit: largest false positive rate of the per-region overlap.

    Returns:
        `roc` (fpr, tpr, threshold), `pr` (recall, precision, threshold; the precision is 1 before
        the first alarm) and `pro` (fpr in [0, limit], pro; no rows unless the units are pixels).
    """
    tables = {name: pd.DataFrame(columns=list(_COLUMNS[name]), dtype=float) for name in _COLUMNS}
    if curve is None:
        return tables
    tp, fp, threshold = _corners(curve)
    fpr, tpr = fp / curve.negatives, tp / curve.positives
    precision = np.where(tp + fp == 0, 1.0, _precision(tp, fp))
    tables["roc"] = _thinned("roc", fpr, tpr, threshold)
    tables["pr"] = _thinned("pr", tpr, precision, threshold)
    if curve.overlap is not None:
        overlap = _interleaved(previous(curve.overlap), curve.overlap)
        pro, inside = np.concatenate([[0.0], overlap, [1.0]]), fpr < limit
        at_limit = np.interp(limit, fpr, pro)
        fpr, pro = np.append(fpr[inside], limit), np.append(pro[inside], at_limit)
        tables["pro"] = _thinned("pro", fpr, pro, scale=limit)
    return tables


def thin(x: Floats, y: Floats, points: int) -> npt.NDArray[np.intp]:
    """Choose at most `points` vertices of a polyline at even steps of its length |dx| + |dy|.

    Both ends are among them; the chosen polyline deviates by at most length / (points - 1).
    """
    if len(x) <= points:
        return np.arange(len(x))
    path = np.append(0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    chosen = np.searchsorted(path, np.linspace(0.0, path[-1], points - 1))
    return np.unique(np.append(chosen, len(x) - 1))


def _f1(curve: Curve) -> Floats:
    either = np.asarray(curve.tp + curve.fp + curve.positives[..., None], dtype=np.float64)
    return np.divide(2.0 * curve.tp, either, out=np.zeros(either.shape), where=either > 0)


def _precision(tp: Counts, fp: Counts) -> Floats:
    """Fraction of the alarms that are right; 0 without alarms."""
    alarms = tp + fp
    return np.divide(tp, alarms, out=np.zeros(alarms.shape), where=alarms > 0)


def _corners(curve: Curve) -> tuple[Floats, Floats, Floats]:
    """Corners (tp, fp, threshold) from no alarm to all: just above each threshold, then at it."""
    just_above = np.nextafter(curve.threshold, np.asarray(np.inf, curve.threshold.dtype))
    tp = np.concatenate([[0.0], _interleaved(previous(curve.tp), curve.tp), [curve.positives]])
    fp = np.concatenate([[0.0], _interleaved(curve.fp_above, curve.fp), [curve.negatives]])
    threshold = np.concatenate([[np.nan], _interleaved(just_above, curve.threshold), [np.nan]])
    return tp, fp, threshold


def _interleaved(first: npt.NDArray[np.generic], second: npt.NDArray[np.generic]) -> Floats:
    return np.stack([first, second], axis=-1, dtype=np.float64).reshape(-1)


def _thinned(curve: str, x: Floats, y: Floats, *others: Floats, scale: float = 1.0) -> pd.DataFrame:
    """Table of the vertices that `thin` chooses, each once; x in units of `scale`."""
    chosen, names = thin(x / scale, y, CURVE_POINTS), _COLUMNS[curve]
    columns = zip(names, (x, y, *others), strict=True)
    table = pd.DataFrame({name: values[chosen] for name, values in columns})
    return table.drop_duplicates(list(names[:2]), ignore_index=True)
