"""Accounts for every row."""
