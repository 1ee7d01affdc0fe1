"""The synthetic set (stage 1 of the paper), from normal training images alone."""

from almrr_pipeline.pipelines.synthesize.pipeline import create_pipeline

__all__ = ["create_pipeline"]
