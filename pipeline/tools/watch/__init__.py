"""`cnclip status --watch`: a run while it works, on the terminal and as a page."""
