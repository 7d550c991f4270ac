"""Plans what a training needs before it starts."""
