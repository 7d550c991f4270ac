"""`cnclip bench-index`: the cost and quality of indices against exact search."""
