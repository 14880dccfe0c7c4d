"""Retrieval metrics, the views they are taken on, and the baselines they are compared with."""
