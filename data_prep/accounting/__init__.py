"""Where every row went."""
