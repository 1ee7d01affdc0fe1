"""The weights, and the thresholds from normal images held out of the training."""

from almrr_pipeline.pipelines.train.pipeline import create_pipeline

__all__ = ["create_pipeline"]
