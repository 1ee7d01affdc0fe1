"""From a trained model and images to anomaly maps, scores and verdicts; and the ways to take a model elsewhere."""
