"""Overlays, scores and verdicts for pictures of one's own."""

from almrr_pipeline.pipelines.predict.pipeline import create_pipeline

__all__ = ["create_pipeline"]
