"""Overlays, scores and verdicts for images of one's own."""

from almrr_pipeline.pipelines.predict.pipeline import create_pipeline

__all__ = ["create_pipeline"]
