"""Training: stages, data, checkpoints."""
