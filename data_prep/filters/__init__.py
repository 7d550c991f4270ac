"""The filter stages: captions, images, scores."""
