"""Vectors in the formats of ANN benchmarks: read a block at a time, and results exported in their shapes."""
