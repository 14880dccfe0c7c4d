"""Rows on disk to batches of tensors."""
