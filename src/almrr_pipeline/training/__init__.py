"""Training: losses, batches from the synthetic set, the Lightning module, checkpoints, guards; `fit` is the door."""
