"""Opens files of vectors; `eval.index.formats.matrix` lists their layouts."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.index.formats.hdf5 import open_hdf5
from eval.index.formats.matrix import BIN, HDF5, MOST_WIDTH, VECS, Matrix, Role, file_of, suffix_of
from eval.index.formats.parquet import open_parquet
from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.files.foreign import foreign
from pipeline.core.files.npy import map_npy
from pipeline.core.records import InputError

_WRITE_AGAIN = "download or write it again"


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
        return open_hdf5(path, "train" if role == "rows" else "test")
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
