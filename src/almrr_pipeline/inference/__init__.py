"""From a trained model and pictures to anomaly maps, scores and verdicts; and the ways to take a model elsewhere."""
