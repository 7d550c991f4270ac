"""Publish models and corpora on a hub."""
