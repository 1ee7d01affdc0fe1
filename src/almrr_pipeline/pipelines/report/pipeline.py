"""everything of every category and seed -> summary, table and page."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Node, Pipeline

from almrr_pipeline.pipelines.per_category import per_category
from almrr_pipeline.pipelines.report import nodes


def create_pipeline(categories: Sequence[str], seeds: Sequence[int]) -> Pipeline:
    """A namespace per category and seed, then one table and one page of them all."""
    collect = Node(
        nodes.collect_results,
        ["metrics", "scores", "curves", "overlays@folder"],
        "results",
        name="collect_results",
    )
    report = Node(
        nodes.report_category,
        ["params:category", "params:seed", "params:data", "manifest", "model", "results"],
        "category_report",
        name="report_category",
    )
    reports = [f"{name}.seed_{seed}.category_report" for name in categories for seed in seeds]
    summarize = Node(
        nodes.summarize_runs,
        reports,
        ["summary", "summary_table"],
        name="summarize_runs",
    )
    render = Node(
        nodes.render_page,
        ["parameters", "data_folder", *reports],
        "report_page",
        name="render_page",
    )
    of_runs = per_category([collect, report], categories, seeds)
    return of_runs + Pipeline([summarize, render])
