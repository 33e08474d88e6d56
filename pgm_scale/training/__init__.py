"""The training loop and what it needs: step, EMA, checkpoints, validation, logs."""
