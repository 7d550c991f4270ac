"""Starting, watching and stopping the ranks."""
