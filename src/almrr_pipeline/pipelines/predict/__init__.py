"""Overlays, scores and verdicts for images of one's own."""
