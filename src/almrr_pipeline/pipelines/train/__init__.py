"""The weights, and the thresholds from validation images, which are not trained on."""
