"""Metrics, confidence intervals and decision thresholds of anomaly maps and scores."""
