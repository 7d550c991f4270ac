"""DeepSpeed files: memory and communication, nothing else. What is learned stands in the run's TOML."""
