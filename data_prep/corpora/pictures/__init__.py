"""The pictures corpus: drawings, icons, flags, stamps and characters with Chinese names."""
