"""A trained model behind HTTP: `almrr serve`."""
