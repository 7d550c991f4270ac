"""Pinned packages of public registries: their table, and how they are fetched, read and drawn."""
