"""Checkpoints and the selection among them."""
