"""Stage 1 of the paper: anomalies simulated on normal pictures, streamed to disk as a pool to train on."""
