"""Steps of the report pipeline."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from almrr_pipeline.config import DataSettings, parse_parameters, split_seed
from almrr_pipeline.evaluation.summary import summarize, summarize_seeds
from almrr_pipeline.kedro_support.hooks import git_commit, numbers
from almrr_pipeline.reporting.examples import read_examples
from almrr_pipeline.reporting.page import CategoryReport, Report, render_report
from almrr_pipeline.datasets.manifest import has_validation, training_split
from almrr_pipeline.datasets.registry import source_for

PACKAGES = ("almrr-pipeline", "torch", "timm", "lightning", "numpy", "scipy", "kedro", "dvc", "mlflow")
"""Packages whose versions the page names."""


def collect_category(
    category: str,
    data: DataSettings,
    manifest: pd.DataFrame,
    model: Path,
    metrics: dict[str, Any],
    scores: pd.DataFrame,
    overlays: Path,
    roc: pd.DataFrame,
    pr: pd.DataFrame,
    pro: pd.DataFrame,
    image_roc: pd.DataFrame,
    image_pr: pd.DataFrame,
) -> CategoryReport:
    """Put together all that is known of one category."""
    training, validation = training_split(manifest, fraction=data.calibration)
    return CategoryReport(
        category=category,
        metrics=metrics,
        history=pd.read_csv(model / "history.csv"),
        scores=scores,
        roc=roc,
        pr=pr,
        pro=pro,
        image_roc=image_roc,
        image_pr=image_pr,
        overlays=read_examples(overlays),
        training_images=len(training),
        validation_images=len(validation),
        has_validation=has_validation(manifest),
        source=source_for(split_seed(category)[0]).license,
    )


def summarize_categories(*reports: CategoryReport) -> tuple[dict[str, Any], pd.DataFrame]:
    """Means over the categories, as metrics.json and as a table with a row per category."""
    metrics = {report.category: report.metrics for report in reports}
    mean = {name: entry["mean"] for name, entry in summarize(metrics).items()}
    rows = [{"category": name, **numbers(values)} for name, values in {**metrics, "mean": mean}.items()]
    summary = {"mean": mean, "categories": {name: numbers(values) for name, values in metrics.items()}}
    repeated = _summarize_repeated(metrics)
    return summary | ({"seeds": repeated} if repeated else {}), pd.DataFrame(rows)


def write_page(parameters: dict[str, Any], data_folder: Path, *reports: CategoryReport) -> str:
    """Render the report."""
    typed = parse_parameters({name: parameters[name] for name in parameters if name not in parameters["categories"]})
    metrics = {report.category: report.metrics for report in reports}
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return render_report(
        Report(
            parameters=typed,
            categories=reports,
            summary=summarize(metrics),
            seeds=_summarize_repeated(metrics),
            versions=versions,
            commit=git_commit(data_folder.parent),
        )
    )


def _summarize_repeated(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and std of the data sets whose runs all name their seed."""
    return {name: spread for name, spread in summarize_seeds(metrics).items() if name not in metrics}
