"""Images of the user's own: their settings, and their way through DVC's stages."""
