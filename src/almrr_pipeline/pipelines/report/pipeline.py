"""everything of every category -> summary, table and page."""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline, node, pipeline

from almrr_pipeline.pipelines.report.nodes import collect_category, summarize_categories, write_page


def create_pipeline(categories: Sequence[str]) -> Pipeline:
    """A namespace per category, then one table and one page of them all."""
    reports = [f"{category}.category_report" for category in categories]
    together = pipeline(
        [
            node(summarize_categories, reports, ["summary", "summary_table"]),
            node(write_page, ["parameters", "data_folder", *reports], "report_page"),
        ]
    )
    return sum((_of_category(category) for category in categories), start=together)


def _of_category(category: str) -> Pipeline:
    inputs = [
        "params:category",
        "params:data",
        "manifest",
        "model",
        "metrics",
        "scores",
        "overlays",
        "roc_curve",
        "pr_curve",
        "pro_curve",
        "image_roc_curve",
        "image_pr_curve",
    ]
    return pipeline([node(collect_category, inputs, "category_report")], namespace=category)
