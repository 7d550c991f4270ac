"""Image features by a CLIP, and what is judged by them: semantic duplicates and classes."""
