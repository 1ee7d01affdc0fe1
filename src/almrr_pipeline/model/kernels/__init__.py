"""Fast implementations of parts of the model: nothing of the paper, only its speed."""
