"""One file of vectors as a matrix that is read a block at a time.

| suffix | layout |
| --- | --- |
| .npy | NumPy's |
| .fbin, .u8bin, .i8bin | big-ann-benchmarks: uint32 rows, uint32 width, then the rows |
| .fvecs, .bvecs, .ivecs | TEXMEX: int32 width before each row |
| .hdf5, .h5 | ann-benchmarks: `train` has the rows, `test` the queries |
| .parquet, or .parquet:COLUMN | a column of lists of numbers |
"""

import os
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.core.arrays import Int64Array

Role = Literal["rows", "queries"]

BIN = {".fbin": "<f4", ".u8bin": "u1", ".i8bin": "i1"}
VECS = {".fvecs": "<f4", ".bvecs": "u1", ".ivecs": "<i4"}
HDF5 = (".hdf5", ".h5")
PARQUET = ".parquet"
MOST_WIDTH = 1 << 16  # no model has wider features; a damaged header may say anything


class Matrix(Protocol):
    """Vectors of one file, [rows, width]."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def block(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return a copy of rows start … stop - 1."""
        ...

    def rows(self, wanted: Int64Array) -> npt.NDArray[Any]:
        """Return a copy of these rows, which are ascending."""
        ...


def suffix_of(path: str) -> str:
    """Return a file's suffix, without the name of a Parquet column."""
    head, _, _ = path.rpartition(":")
    return PARQUET if head.endswith(PARQUET) else os.path.splitext(path)[1]


def is_vectors(path: str) -> bool:
    """Return whether a name is that of a file of vectors."""
    return suffix_of(path) in (".npy", *BIN, *VECS, *HDF5, PARQUET)


def file_of(path: str) -> str:
    """Return the path of the file, without the name of a Parquet column."""
    return path.rpartition(":")[0] if suffix_of(path) == PARQUET and not path.endswith(PARQUET) else path
