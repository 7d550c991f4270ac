"""Concepts of captions, and a corpus balanced by them."""
