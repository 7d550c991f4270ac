"""Commands that ask or change one thing about a run."""
