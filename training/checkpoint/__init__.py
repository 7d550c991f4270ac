"""Checkpoints and checkpoint selection."""
