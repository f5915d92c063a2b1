"""Fine-tuning: objective, trainer, checkpoints, logs."""
