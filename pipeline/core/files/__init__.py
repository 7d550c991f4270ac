"""Reads, checks and writes files: foreign files, durability, locks, damage."""
