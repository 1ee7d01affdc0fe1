"""Images, textures and backbone weights: fetched, verified, listed."""
