"""Means of metrics over seeds and categories."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np

Numbers = dict[str, float | None]  # metrics by name; None where undefined


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
    categories = {name: _aggregate(of.values(), np.mean) for name, of in runs.items()}
    repeated = {name: of.values() for name, of in runs.items() if len(of) > 1}
    return {
        "mean": _aggregate(categories.values(), np.mean),
        "categories": categories,
        "std": {
            name: _aggregate(of, partial(np.std, ddof=1), least=2) for name, of in repeated.items()
        },
        "runs": runs,
    }


HEADLINE = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro_30")
"""What a table of many categories and experiments has room for."""


def pick_headline(summary: Mapping[str, Any]) -> dict[str, Numbers]:
    """A few metrics of each category, and their means as `mean`, with four decimals.

    Small enough for git to keep, and rounded to what two processors agree on most of the time.
    """
    rows: dict[str, Numbers] = {**summary["categories"], "mean": summary["mean"]}
    return {
        name: {
            metric: None if (value := row.get(metric)) is None else round(value, 4)
            for metric in HEADLINE
        }
        for name, row in rows.items()
    }


def _numbers(values: Mapping[str, Any]) -> Numbers:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float | None) and not name.endswith("_threshold")
    }


def _aggregate(
    rows: Collection[Numbers], statistic: Callable[[list[float]], np.floating], *, least: int = 1
) -> Numbers:
    """Statistic of each metric's defined values; None with fewer than `least` of them."""
    found: Numbers = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [value for row in rows if (value := row.get(name)) is not None]
        found[name] = float(statistic(values)) if len(values) >= least else None
    return found
