"""results of every category and seed -> summary, table and page."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline

from almrr_pipeline.pipelines.per_category import per_category, step
from almrr_pipeline.pipelines.report import nodes


def create_pipeline(categories: Sequence[str], seeds: Sequence[int]) -> Pipeline:
    """A namespace per category and seed, then one table and one page of them all."""
    steps = [
        step(nodes.collect_results, "metrics scores curves overlays@folder", "results"),
        step(
            nodes.report_category,
            "params:category params:seed params:data manifest model results",
            "category_report",
        ),
    ]
    reports = " ".join(
        f"{name}.seed_{seed}.category_report" for name in categories for seed in seeds
    )
    together = [
        step(nodes.summarize_runs, reports, "summary summary_table"),
        step(nodes.render_page, f"parameters data_folder summary {reports}", "report_page"),
    ]
    return per_category(steps, categories, seeds) + Pipeline(together)
