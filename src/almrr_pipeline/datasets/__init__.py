"""Datasets and textures: where they come from, how they are fetched, checked and listed."""
