"""What a run may say about training."""
