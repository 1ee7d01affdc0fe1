"""Images, textures and backbone weights: fetched, verified, listed."""

from almrr_pipeline.pipelines.fetch.pipeline import create_pipeline

__all__ = ["create_pipeline"]
