"""DeepSpeed around the model."""
