"""Results as pictures and as one page: overlays, plots, the report."""
