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
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.files.foreign import foreign
from pipeline.core.files.npy import map_npy
from pipeline.core.records import InputError

Role = Literal["rows", "queries"]

BIN = {".fbin": "<f4", ".u8bin": "u1", ".i8bin": "i1"}
VECS = {".fvecs": "<f4", ".bvecs": "u1", ".ivecs": "<i4"}
HDF5 = (".hdf5", ".h5")
PARQUET = ".parquet"
MOST_WIDTH = 1 << 16  # no model has wider features; a damaged header may say anything
_WRITE_AGAIN = "download or write it again"


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


def open_matrix(path: str, role: Role = "rows") -> Matrix:
    """Read the header of a file and check it against the file's length.

    Raises:
        InputError: if the file is missing, damaged, or not of two dimensions.
    """
    name, suffix = file_of(path), suffix_of(path)
    if not store.exists(name):
        remedy = "embed first" if suffix == ".npy" else "check the path"
        raise InputError(f"{name}: no such file; {remedy}")
    if store.is_local(name) and not os.path.isfile(name):
        raise InputError(f"{name}: not a regular file; give a file of vectors, or a folder with img_emb/")
    if suffix == ".npy":
        return _open_npy(path)
    if not store.is_local(name):
        raise InputError(f"{name}: {suffix} files are read from local disks only; copy it first")
    if suffix in BIN:
        return _open_bin(path, BIN[suffix])
    if suffix in VECS:
        return _open_vecs(path, VECS[suffix])
    if suffix in HDF5:
        from eval.index.formats.hdf5 import open_hdf5

        return open_hdf5(path, "train" if role == "rows" else "test")
    from eval.index.formats.parquet import open_parquet

    return open_parquet(path)


@dataclass(frozen=True, slots=True)
class _Mapped:
    array_ND: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        return self.array_ND.shape[0], self.array_ND.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array_ND.dtype

    def block(self, start: int, stop: int) -> npt.NDArray[Any]:
        return np.array(self.array_ND[start:stop])

    def rows(self, wanted: Int64Array) -> npt.NDArray[Any]:
        return np.array(self.array_ND[wanted])


@dataclass(frozen=True, slots=True)
class _Vecs:
    """Rows with their width before each; it is checked where a row is read."""

    path: str
    raw_NB: npt.NDArray[np.uint8]
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, int]:
        return self.raw_NB.shape[0], (self.raw_NB.shape[1] - 4) // self.dtype.itemsize

    def block(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self._vectors(np.array(self.raw_NB[start:stop]), np.arange(start, stop))

    def rows(self, wanted: Int64Array) -> npt.NDArray[Any]:
        return self._vectors(np.array(self.raw_NB[wanted]), wanted)

    def _vectors(self, raw_BB: npt.NDArray[np.uint8], numbers_B: Int64Array) -> npt.NDArray[Any]:
        width_B = np.ascontiguousarray(raw_BB[:, :4]).view("<i4")[:, 0]
        wrong = np.flatnonzero(width_B != self.shape[1])
        if len(wrong):
            raise InputError(
                f"{self.path}: row {numbers_B[wrong[0]]} has width {width_B[wrong[0]]}, the first row has"
                f" {self.shape[1]}: {_WRITE_AGAIN}"
            )
        return np.ascontiguousarray(raw_BB[:, 4:]).view(self.dtype)


def _open_npy(path: str) -> Matrix:
    matrix = map_npy(path, "embed again")
    if matrix.dtype not in (np.float16, np.float32) or matrix.ndim != 2 or not matrix.shape[1]:
        raise InputError(
            f"{path}: expected float16 or float32 features [rows, dim], found {matrix.dtype}"
            f" {list(matrix.shape)}"
        )
    return _Mapped(matrix)


def _open_bin(path: str, kind: str) -> Matrix:
    dtype, num_bytes = np.dtype(kind), os.path.getsize(path)
    with foreign(path, "file of vectors", _WRITE_AGAIN), open(path, "rb") as file:
        head = file.read(8)
    num_rows, width = (int(number) for number in np.frombuffer(head, "<u4")) if len(head) == 8 else (0, 0)
    wanted = 8 + num_rows * width * dtype.itemsize
    if not num_rows or not 0 < width <= MOST_WIDTH or wanted != num_bytes:
        raise InputError(
            f"{path}: its first 8 bytes say {num_rows:,} rows of width {width:,} ({wanted:,} bytes), but it"
            f" has {num_bytes:,} bytes: {_WRITE_AGAIN}; a cropped file needs its own number of rows there"
        )
    return _Mapped(np.memmap(path, dtype, "r", offset=8, shape=(num_rows, width)))


def _open_vecs(path: str, kind: str) -> Matrix:
    dtype, num_bytes = np.dtype(kind), os.path.getsize(path)
    with foreign(path, "file of vectors", _WRITE_AGAIN), open(path, "rb") as file:
        head = file.read(4)
    width = int(np.frombuffer(head, "<i4")[0]) if len(head) == 4 else 0
    record = 4 + width * dtype.itemsize
    if not 0 < width <= MOST_WIDTH or num_bytes % record:
        raise InputError(
            f"{path}: its first row says width {width:,}, which does not divide {num_bytes:,} bytes into"
            f" rows: {_WRITE_AGAIN}"
        )
    return _Vecs(path, np.memmap(path, np.uint8, "r", shape=(num_bytes // record, record)), dtype)
