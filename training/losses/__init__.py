"""Losses over the global batch."""
