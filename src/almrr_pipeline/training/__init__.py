"""Training of ALMRR on a synthetic set; `train.fit` is the entry point."""
