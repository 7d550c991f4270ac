"""Corpora that the project makes itself: the demo and the emoji."""
