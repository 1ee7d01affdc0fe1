"""Training: losses, batches from the pool, the Lightning module, checkpoints, guards; `fit` is the door."""
