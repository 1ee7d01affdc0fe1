"""All categories side by side: a table, a page, and runs in MLflow that can be compared."""

from almrr_pipeline.pipelines.report.pipeline import create_pipeline

__all__ = ["create_pipeline"]
