"""Steps of the report pipeline."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from almrr_pipeline.config import DataSettings, parse_parameters
from almrr_pipeline.datasets.manifest import has_validation, training_split
from almrr_pipeline.datasets.registry import dataset_for
from almrr_pipeline.evaluation.summary import summarize
from almrr_pipeline.kedro_support.tracking import git_commit, numbers
from almrr_pipeline.reporting.examples import read_examples
from almrr_pipeline.reporting.page import CategoryReport, Report, render_report

PACKAGES = (
    "almrr-pipeline", "torch", "timm", "lightning", "numpy", "scipy", "kedro", "dvc", "mlflow",
)  # fmt: skip
"""Packages whose versions the page names."""


def collect_results(
    metrics: dict[str, Any],
    scores: pd.DataFrame,
    curves: Mapping[str, Callable[[], pd.DataFrame]],
    overlays: Path,
) -> dict[str, Any]:
    """Read what the evaluation of one category and seed has written."""
    return {
        "metrics": metrics,
        "scores": scores,
        "curves": {name: load() for name, load in curves.items()},
        "overlays": read_examples(overlays),
    }


def report_category(
    category: str,
    seed: int,
    data: DataSettings,
    manifest: pd.DataFrame,
    model: Path,
    results: dict[str, Any],
) -> CategoryReport:
    """Put together all that is known of one category and seed."""
    training, validation = training_split(manifest, fraction=data.validation_fraction)
    return CategoryReport(
        category=category,
        seed=seed,
        history=pd.read_csv(model / "history.csv"),
        training_images=len(training),
        validation_images=len(validation),
        has_validation=has_validation(manifest),
        license=dataset_for(category).license,
        **results,
    )


def summarize_runs(*reports: CategoryReport) -> tuple[dict[str, Any], pd.DataFrame]:
    """Means over the categories, as metrics.json and as a table with a row per category and seed."""
    summary = summarize(_metrics_by_run(reports))
    rows = [
        {"category": report.category, "seed": report.seed, **numbers(report.metrics)}
        for report in reports
    ]
    rows.append({"category": "mean", **numbers(summary["mean"])})
    return summary, pd.DataFrame(rows).astype({"seed": "Int64"})


def render_page(parameters: dict[str, Any], data_folder: Path, *reports: CategoryReport) -> str:
    """Render the report."""
    sections = {
        name: parameters[name] for name in parameters if name not in parameters["categories"]
    }
    return render_report(
        Report(
            parameters=parse_parameters(sections),
            categories=reports,
            summary=summarize(_metrics_by_run(reports)),
            versions={
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            commit=git_commit(data_folder.parent),
        )
    )


def _metrics_by_run(reports: Sequence[CategoryReport]) -> dict[str, dict[int, dict[str, Any]]]:
    metrics: dict[str, dict[int, dict[str, Any]]] = {}
    for report in reports:
        metrics.setdefault(report.category, {})[report.seed] = dict(report.metrics)
    return metrics
