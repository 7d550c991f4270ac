"""Reads foreign `.npy` files after checking their headers against the file's size."""

import io
import math
import tempfile
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipeline.core import store
from pipeline.core.files.foreign import foreign
from pipeline.core.records import InputError

_WHAT = ".npy file"


def read_npy(path: str, remedy: str) -> npt.NDArray[Any]:
    """Return the array of a file, in memory.

    Raises:
        InputError: if the file is absent, not a `.npy` file, or shorter than its header says; it ends with
            `remedy`.
    """
    with foreign(path, _WHAT, remedy):
        num_bytes = store.num_bytes(path)
        with store.open_read(path) as file:
            return _read(file, num_bytes, path, remedy)


def read_npy_bytes(data: bytes, where: str, remedy: str) -> npt.NDArray[Any]:
    """Return the array in the bytes of a `.npy` file.

    Raises:
        InputError: as `read_npy` raises it.
    """
    with foreign(where, _WHAT, remedy):
        return _read(io.BytesIO(data), len(data), where, remedy)


def read_npy_rows(path: str, first: int, end: int, remedy: str) -> npt.NDArray[Any]:
    """Return rows [first, end) of the array in a file, in memory; no others are read.

    Raises:
        InputError: as `read_npy` raises it, or if the array is stored by columns.
    """
    with foreign(path, _WHAT, remedy), store.open_read(path) as file:
        (num_rows, *rest), by_columns, dtype = _check_header(file, store.num_bytes(path), path, remedy)
        if by_columns:
            raise InputError(f"{path}: stored by columns (Fortran order): {remedy}")
        row_bytes = math.prod(rest) * dtype.itemsize
        file.seek(first * row_bytes, io.SEEK_CUR)
        data = file.read((min(end, num_rows) - first) * row_bytes)
        return np.frombuffer(data, dtype).reshape(-1, *rest)


def map_npy(path: str, remedy: str) -> npt.NDArray[Any]:
    """Return the array of a file, memory-mapped; of a URL, a temporary copy that goes with the array.

    Raises:
        InputError: as `read_npy` raises it.
    """
    with foreign(path, _WHAT, remedy):
        if store.is_local(path):
            return _map(path, path, remedy)
        with tempfile.NamedTemporaryFile(prefix="cnclip-", suffix=".npy") as copy:
            fs, name = store.remote(path)
            fs.get_file(name, copy.name)
            return _map(copy.name, path, remedy)


def _map(path: str, where: str, remedy: str) -> npt.NDArray[Any]:
    with store.open_read(path) as file:
        _check_header(file, store.num_bytes(path), where, remedy)
    mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _read(file: IO[bytes], num_bytes: int, where: str, remedy: str) -> npt.NDArray[Any]:
    _check_header(file, num_bytes, where, remedy)
    file.seek(0)
    array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _check_header(
    file: IO[bytes], num_bytes: int, where: str, remedy: str
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, Fortran order and type of the array that the file begins with; its data is next."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:  # 3.0 is only for field names outside Latin-1
        raise InputError(f"{where}: .npy version {version[0]}.{version[1]}, not 1.0 or 2.0: {remedy}")
    shape, by_columns, dtype = readers[version](file)
    if dtype.hasobject:
        raise InputError(f"{where}: holds Python objects, which are not read: save plain numbers")
    wanted, held = math.prod(shape) * dtype.itemsize, num_bytes - file.tell()
    if min(shape, default=0) < 0 or wanted > held:
        raise InputError(
            f"{where}: its header names an array {list(shape)} of {dtype} ({wanted:,} bytes), but {held:,}"
            f" bytes follow: {remedy}"
        )
    return shape, by_columns, dtype
