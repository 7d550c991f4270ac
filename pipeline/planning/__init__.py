"""What a training needs, computed before anything starts."""
