"""Results as overlays, charts and one page, the report."""
