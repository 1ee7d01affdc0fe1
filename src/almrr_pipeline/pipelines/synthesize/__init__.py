"""The synthetic set (stage 1 of the paper), from normal training images alone."""
