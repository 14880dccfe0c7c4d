"""The loop that trains a task: accumulation, precision, checkpoints, callbacks."""
