"""Results as images and as one page: overlays, plots, the report."""
