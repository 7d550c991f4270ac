"""Reads ann-benchmarks' HDF5 files: `train`, `test`, `neighbors`, and the attribute `distance`."""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.index.formats.matrix import MOST_WIDTH, Matrix
from eval.index.metric import Metric
from pipeline.core.arrays import Int64Array
from pipeline.core.files.foreign import foreign
from pipeline.core.records import InputError

_DISTANCES: dict[str, Metric] = {
    "angular": "cosine",
    "cosine": "cosine",
    "euclidean": "l2",
    "dot": "ip",
    "ip": "ip",
}
_REMEDY = "download it again"
_MOST_DEFLATED = 1032  # zlib's best ratio


def import_h5py(path: str) -> Any:
    """Return h5py.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: HDF5 needs h5py: pip install h5py") from None
    return h5py


def metric_of(path: str) -> Metric:
    """Return the metric that the file names.

    Raises:
        InputError: for none, and for one that FAISS does not search by.
    """
    h5py = import_h5py(path)
    with foreign(path, "HDF5 file", _REMEDY), h5py.File(path, "r") as file:
        named = file.attrs.get("distance")
    name = named.decode(errors="replace") if isinstance(named, bytes) else str(named)
    if name not in _DISTANCES:
        raise InputError(
            f"{path}: its attribute `distance` is {name}, not one of {', '.join(_DISTANCES)}; give --metric"
        )
    return _DISTANCES[name]


def num_neighbours(path: str) -> int:
    """Return how many neighbours the file has for each query, 0 if it has none."""
    h5py = import_h5py(path)
    with foreign(path, "HDF5 file", _REMEDY), h5py.File(path, "r") as file:
        return _checked(path, file, "neighbors").shape[1] if "neighbors" in file else 0


def open_hdf5(path: str, name: str) -> Matrix:
    """Check the sizes of a data set.

    Raises:
        InputError: for a file without it, and for one that is larger than the file can hold.
    """
    h5py = import_h5py(path)
    with foreign(path, "HDF5 file", _REMEDY), h5py.File(path, "r") as file:
        found = _checked(path, file, name)
        return _Hdf5(path, name, (int(found.shape[0]), int(found.shape[1])), found.dtype)


@dataclass(frozen=True, slots=True)
class _Hdf5:
    path: str
    name: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def block(self, start: int, stop: int) -> npt.NDArray[Any]:
        with foreign(self.path, "HDF5 file", _REMEDY), import_h5py(self.path).File(self.path, "r") as file:
            return np.asarray(file[self.name][start:stop])

    def rows(self, wanted: Int64Array) -> npt.NDArray[Any]:
        """Read the blocks that hold these rows; h5py is slow on lists of rows."""
        with foreign(self.path, "HDF5 file", _REMEDY), import_h5py(self.path).File(self.path, "r") as file:
            found, parts = file[self.name], []
            block = max(1, (64 << 20) // max(1, self.shape[1] * self.dtype.itemsize))
            for number in np.unique(wanted // block).tolist():
                first = number * block
                inside = wanted[(wanted >= first) & (wanted < first + block)]
                low, high = int(inside[0]), int(inside[-1]) + 1
                parts.append(np.asarray(found[low:high])[inside - low])
            return np.concatenate(parts) if parts else np.zeros((0, self.shape[1]), self.dtype)


def _checked(path: str, file: Any, name: str) -> Any:
    """Return a data set whose sizes fit the file."""
    if name not in file:
        raise InputError(f"{path}: has no data set `{name}`, found {', '.join(file) or 'none'}")
    found = file[name]
    shape = tuple(getattr(found, "shape", None) or ())
    if len(shape) != 2 or 0 in shape or shape[1] > MOST_WIDTH or found.dtype.kind not in "fiu":
        raise InputError(f"{path}: `{name}` is {list(shape)}, not numbers of shape [rows, width]: {_REMEDY}")
    if found.external or found.is_virtual:
        raise InputError(
            f"{path}: `{name}` lies in other files, which cnclip does not follow; copy it into one"
        )
    wanted, held = math.prod(shape) * found.dtype.itemsize, found.id.get_storage_size()
    most = held * _MOST_DEFLATED if found.compression else held
    if held > os.path.getsize(path) or wanted > most:
        raise InputError(
            f"{path}: `{name}` is {list(shape)} of {found.dtype} ({wanted:,} bytes), but only {held:,} bytes"
            f" of it are in the file: {_REMEDY}"
        )
    return found
