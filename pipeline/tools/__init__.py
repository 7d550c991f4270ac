"""Commands that show or change one thing about a run."""
