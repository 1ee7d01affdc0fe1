"""Stage 1 of the paper: anomalies simulated on normal images, kept as a synthetic set."""
