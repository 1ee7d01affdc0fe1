"""Anomaly maps of the test images, their scores, metrics and overlays."""
