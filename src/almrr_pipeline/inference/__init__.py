"""Anomaly maps, scores and verdicts from a trained model; fusing, calibration and export."""
