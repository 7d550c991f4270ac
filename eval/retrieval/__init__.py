"""Retrieval: predictions, official scores, baselines."""
