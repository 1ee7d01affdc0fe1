"""Means of metrics over seeds and categories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Numbers = dict[str, float | None]
"""Metrics by name; None where undefined."""


def summarize(metrics: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Average each metric over the seeds of a category, and over the categories that define it.

    Thresholds are left out: they belong to one model, their mean has no meaning.

    Args:
        metrics: content of metrics.json by category and seed.

    Returns:
        `mean`: over the categories, by metric; None where no category defines it;
        `categories`: the means over the seeds, by category and metric;
        `std`: the sample standard deviations over the seeds, by category and metric, of categories
        with two seeds or more; None where fewer than two of them define the metric;
        `runs`: the metrics by category, seed (as text) and name.
    """
    runs = {
        category: {str(seed): _numbers(values) for seed, values in of_category.items()}
        for category, of_category in metrics.items()
    }
    categories = {category: _mean(by_seed.values()) for category, by_seed in runs.items()}
    return {
        "mean": _mean(categories.values()),
        "categories": categories,
        "std": {
            category: _std(by_seed.values())
            for category, by_seed in runs.items()
            if len(by_seed) > 1
        },
        "runs": runs,
    }


def _numbers(values: Mapping[str, Any]) -> Numbers:
    return {
        name: value
        for name, value in values.items()
        if (value is None or isinstance(value, (int, float))) and not name.endswith("_threshold")
    }


def _mean(rows: Iterable[Numbers]) -> Numbers:
    return {name: float(np.mean(of)) if of else None for name, of in _columns(rows).items()}


def _std(rows: Iterable[Numbers]) -> Numbers:
    columns = _columns(rows)
    return {
        name: float(np.std(of, ddof=1)) if len(of) > 1 else None for name, of in columns.items()
    }


def _columns(rows: Iterable[Numbers]) -> dict[str, list[float]]:
    """Defined values of each metric that occurs, in the order of occurrence."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).extend([] if value is None else [value])
    return columns
