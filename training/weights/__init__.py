"""Weights in and out of every format."""
