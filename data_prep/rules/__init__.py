"""Pure rules on captions and images: no torch, no files."""
