"""Chooses an index and its search parameters for a recall."""
