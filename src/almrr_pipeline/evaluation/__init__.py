"""Metrics, their uncertainty, and decision thresholds; knows nothing of models, only of anomaly maps and scores."""
