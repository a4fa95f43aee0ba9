"""Ways into a training script that knows nothing of us."""
