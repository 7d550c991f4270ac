"""File formats that the corpus is read from and written to."""
