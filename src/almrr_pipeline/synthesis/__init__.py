"""Stage 1 of the paper: anomalies simulated on normal images, streamed to disk as a synthetic set to train on."""
