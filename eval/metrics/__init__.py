"""Recall, classification metrics and their intervals."""
