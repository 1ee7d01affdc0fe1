"""The report pipeline: results of every category and seed -> summary, table and page."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from kedro.pipeline import Node

from almrr_pipeline.baselines.findings import list_warnings
from almrr_pipeline.config import DataSettings, parse_parameters
from almrr_pipeline.datasets.manifest import has_validation, training_split
from almrr_pipeline.datasets.registry import dataset_for
from almrr_pipeline.evaluation.summary import pick_headline, summarize
from almrr_pipeline.kedro_support.tracking import git_commit, numbers
from almrr_pipeline.pipelines.per_category import step
from almrr_pipeline.reporting.examples import read_examples
from almrr_pipeline.reporting.page import CategoryReport, Report, render_report

logger = logging.getLogger(__name__)
LIBRARIES = ["torch", "timm", "lightning", "numpy", "scipy", "kedro", "dvc", "mlflow"]
PACKAGES = ["almrr-pipeline", *LIBRARIES]
"""Packages whose versions the page names."""


def collect_results(
    metrics: dict[str, Any],
    scores: pd.DataFrame,
    curves: Mapping[str, Callable[[], pd.DataFrame]],
    overlays: Path,
    gallery: dict[str, Any],
) -> dict[str, Any]:
    """Read what the evaluation of one category and seed has written."""
    return {
        "metrics": metrics,
        "scores": scores,
        "curves": {name: load() for name, load in curves.items()},
        "overlays": read_examples(overlays),
        "gallery": gallery,
    }


def report_category(
    category: str,
    seed: int,
    data: DataSettings,
    manifest: pd.DataFrame,
    model: Path,
    results: dict[str, Any],
    baselines: dict[str, Any],
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
        baselines=baselines,
        **results,
    )


def summarize_runs(*reports: CategoryReport) -> tuple[dict[str, Any], pd.DataFrame]:
    """Means over the categories, and a table with a row per category and seed, with baselines."""
    metrics: dict[str, dict[int, Mapping[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    for report in reports:
        values = {**report.metrics, **report.baselines}
        metrics.setdefault(report.category, {})[report.seed] = values
        rows.append({"category": report.category, "seed": report.seed, **numbers(values)})
    summary = summarize(metrics)
    for warning in list_warnings(summary["categories"]):
        logger.warning("%s", warning)
    rows.append({"category": "mean", **numbers(summary["mean"])})
    return summary, pd.DataFrame(rows).astype({"seed": "Int64"})


def render_page(
    parameters: dict[str, Any],
    data_folder: Path,
    summary: dict[str, Any],
    *reports: CategoryReport,
) -> str:
    """Render the report."""
    categories = parameters["categories"]
    sections = {name: value for name, value in parameters.items() if name not in categories}
    report = Report(
        parameters=parse_parameters(sections),
        categories=reports,
        summary=summary,
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        commit=git_commit(data_folder.parent),
    )
    return render_report(report)


NODES = [
    step(collect_results, "metrics scores curves overlays@folder gallery", "results"),
    step(
        report_category,
        "params:category params:seed params:data manifest model results baselines",
        "category_report",
    ),
]


def summarizing_nodes(categories: Iterable[str], seeds: Iterable[int]) -> list[Node]:
    """The nodes that take the reports of all categories and seeds."""
    runs = product(categories, seeds)
    reports = " ".join(f"{category}.seed_{seed}.category_report" for category, seed in runs)
    return [
        step(summarize_runs, reports, "summary summary_table"),
        step(pick_headline, "summary", "headline"),
        step(render_page, f"parameters data_folder summary {reports}", "report_page"),
    ]
