"""The run: the core below, the executors, the command line and its tools above."""

# Before polars: if numpy is not imported yet, polars puts a stand-in in its place, which overwrites its own
# attributes with numpy's and fails at a second look-up ("'module' object does not support item assignment").
import numpy  # noqa: F401
