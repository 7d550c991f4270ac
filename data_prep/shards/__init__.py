"""Shards: the stage that packs them, and conversions of finished ones."""
