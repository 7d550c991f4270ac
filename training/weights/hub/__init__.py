"""Weights by name: the paper's models and those of a Hugging Face hub, kept in Hugging Face's own cache."""
