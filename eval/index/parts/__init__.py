"""Indices in parts after they are built: searched, filtered, extended, and rows removed."""
