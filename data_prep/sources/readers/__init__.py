"""Readers of images that are on disk already, one module a family of formats."""
