"""`cnclip law`: a grid of small trainings, the law of their errors over compute, and what it predicts."""
