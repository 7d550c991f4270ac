"""FAISS indices."""
