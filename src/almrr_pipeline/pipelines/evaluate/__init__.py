"""Anomaly maps of the test images, and what they are worth."""

from almrr_pipeline.pipelines.evaluate.pipeline import create_pipeline

__all__ = ["create_pipeline"]
