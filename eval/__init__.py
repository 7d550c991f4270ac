# Before polars: pipeline/__init__.py says why.
import numpy  # noqa: F401
