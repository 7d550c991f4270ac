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


def map_npy(path: str, remedy: str) -> npt.NDArray[Any]:
    """Return the array of a file, memory-mapped; of a URL, a temporary copy that goes with the array.

    Raises:
        InputError: as `read_npy` raises it.
    """
    if not store.is_local(path):
        with tempfile.NamedTemporaryFile(prefix="cnclip-", suffix=".npy") as copy:
            with foreign(path, _WHAT, remedy):
                fs, name = store.remote(path)
                fs.get_file(name, copy.name)
            return map_npy(copy.name, remedy)
    with foreign(path, _WHAT, remedy):
        with store.open_read(path) as file:
            _check_header(file, store.num_bytes(path), path, remedy)
        mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped


def _read(file: IO[bytes], num_bytes: int, where: str, remedy: str) -> npt.NDArray[Any]:
    _check_header(file, num_bytes, where, remedy)
    file.seek(0)
    array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _check_header(file: IO[bytes], num_bytes: int, where: str, remedy: str) -> None:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:  # 3.0 is only for field names outside Latin-1
        raise InputError(f"{where}: .npy version {version[0]}.{version[1]}, not 1.0 or 2.0: {remedy}")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise InputError(f"{where}: holds Python objects, which are not read: save plain numbers")
    wanted, held = math.prod(shape) * dtype.itemsize, num_bytes - file.tell()
    if min(shape, default=0) < 0 or wanted > held:
        raise InputError(
            f"{where}: its header names an array {list(shape)} of {dtype} ({wanted:,} bytes), but {held:,}"
            f" bytes follow: {remedy}"
        )
