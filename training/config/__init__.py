"""The settings of training."""
