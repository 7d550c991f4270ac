"""Who runs a stage's independent tasks."""
