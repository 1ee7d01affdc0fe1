"""Means over categories, and means with stds over seeds, of metrics.json files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from almrr_pipeline.config import split_seed


def summarize(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Average each metric over the categories that define it.

    Args:
        metrics: content of metrics.json by category.

    Returns:
        By metric: `mean` (None if no category defines it), `categories` that define it, and `of` how many there are.
    """
    summary: dict[str, dict[str, float | int | None]] = {}
    for name in _metric_names(metrics):
        defined = _defined(metrics, name)
        mean = float(np.mean(defined)) if defined else None
        summary[name] = {"mean": mean, "categories": len(defined), "of": len(metrics)}
    return summary


def summarize_seeds(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Mean and sample standard deviation of each metric over the seeds of a category.

    Args:
        metrics: content of metrics.json by category; X_seed0, X_seed1 ... are runs of X, any other name is the only
            run of itself. Where X is there too, its own run is not one of theirs (its seed may be any), and theirs
            are called X_seed*.

    Returns:
        By category, by metric: `mean` (None if no run defines it), `std` (None with fewer than two), and `seeds`,
        the runs that define it.
    """
    runs: dict[str, dict[str, Mapping[str, Any]]] = {}
    for category, values in metrics.items():
        repeated, seed = split_seed(category)
        name = f"{repeated}_seed*" if seed is not None and repeated in metrics else repeated
        runs.setdefault(name, {})[category] = values
    return {
        category: {name: _spread(_defined(of, name)) for name in _metric_names(of)} for category, of in runs.items()
    }


def _metric_names(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Entries that are numbers or null, in the order met; a threshold belongs to one model, its mean means nothing."""
    names = {
        name: None
        for values in metrics.values()
        for name, value in values.items()
        if (value is None or isinstance(value, (int, float))) and not name.endswith("_threshold")
    }
    return list(names)


def _defined(metrics: Mapping[str, Mapping[str, Any]], name: str) -> list[float]:
    return [values[name] for values in metrics.values() if values.get(name) is not None]


def _spread(values: list[float]) -> dict[str, float | int | None]:
    return {
        "mean": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "seeds": len(values),
    }
