"""Baselines of every category: a memory bank of features, and the nearest whole image."""
