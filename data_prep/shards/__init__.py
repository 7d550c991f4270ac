"""Shards: the stage that packs them, and what is made from finished ones."""
