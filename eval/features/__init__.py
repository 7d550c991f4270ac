"""Features of evaluation sets, files and shards."""
