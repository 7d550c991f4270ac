"""Reads features that do not fit into memory from a sequence of `.npy` files, one block at a time."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.features.layout import EMBEDDING_FOLDERS, Side, check_vectors
from eval.features.model_identity import ModelIdentity, read_identity
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.config import digest
from pipeline.core.files.npy import map_npy
from pipeline.core.records import InputError

BLOCK_ROWS = 65_536  # read, checked and added at once: 128 MiB of float32 at 512


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A sequence of `.npy` files that acts as one matrix."""

    paths: tuple[str, ...]
    first_rows: tuple[int, ...]  # of each file, followed by the total number of rows
    dim: int
    model: ModelIdentity | None = None  # None if unknown

    @property
    def num_rows(self) -> int:
        return self.first_rows[-1]

    @classmethod
    def open(cls, source: str, *, side: Side = "image") -> "Embeddings":
        """Read the headers of all files.

        Raises:
            InputError: if there are no files, and for other types and mixed widths.
        """
        paths = _npy_files(source, side)
        first_rows, dim = [0], 0
        for path in paths:
            matrix = _open_npy(path)
            if dim and matrix.shape[1] != dim:
                raise InputError(
                    f"{path}: features of width {matrix.shape[1]}, but {paths[0]} has {dim}:"
                    " they come from different models"
                )
            dim = matrix.shape[1]
            first_rows.append(first_rows[-1] + len(matrix))
        if not first_rows[-1]:
            raise InputError(f"{source}: holds files of features, but no rows")
        return cls(tuple(paths), tuple(first_rows), dim, read_identity(source))

    def blocks(self, start: int, stop: int) -> Iterator[Float32Array]:
        """Yield rows start … stop - 1 as checked float32 blocks, in order.

        Raises:
            InputError: for features that are NaN or not unit-norm; it names file and row.
        """
        for path, first, end in zip(self.paths, self.first_rows, self.first_rows[1:], strict=False):
            low, high = max(start, first), min(stop, end)
            if low >= high:
                continue
            matrix = _open_npy(path)
            for row in range(low, high, BLOCK_ROWS):
                last = min(row + BLOCK_ROWS, high)
                block_BD = np.array(matrix[row - first : last - first], dtype=np.float32)
                # float16 keeps three digits: restore the length before checking and using it
                if matrix.dtype == np.float16:
                    block_BD = _unit(block_BD)
                check_vectors(block_BD, f"{path} from row {row - first}")
                yield block_BD

    def rows(self, wanted: Int64Array) -> Float32Array:
        """Return these rows (ascending), gathered file by file."""
        parts = []
        for path, first, end in zip(self.paths, self.first_rows, self.first_rows[1:], strict=False):
            inside = wanted[(wanted >= first) & (wanted < end)] - first
            if len(inside):
                matrix = _open_npy(path)
                part = np.array(matrix[inside], dtype=np.float32)
                parts.append(_unit(part) if matrix.dtype == np.float16 else part)
        found: Float32Array = np.concatenate(parts)
        check_vectors(found, f"{self.paths[0]} and the files after it")
        return found

    def digest(self) -> str:
        """Hash names, sizes, and the first and last MiB of each file, which avoids reading terabytes."""
        return digest([(os.path.basename(path), *store.digest_edges(path)) for path in self.paths])


def _npy_files(source: str, side: Side) -> list[str]:
    if source.endswith(".npy"):
        names = [source]
    else:
        inner = store.join(source, EMBEDDING_FOLDERS[side])
        folder = inner if store.list_files(inner) else source
        names = [store.join(folder, name) for name in store.list_files(folder) if name.endswith(".npy")]
    if not names:
        raise InputError(
            f"{source}: holds no .npy features; give a .npy file, a folder of them, or one with"
            f" {EMBEDDING_FOLDERS[side]}/"
        )
    # img_emb_10.npy comes after img_emb_9.npy
    return sorted(
        names, key=lambda name: [int(text) if text.isdigit() else text for text in re.split(r"(\d+)", name)]
    )


def _open_npy(path: str) -> npt.NDArray[Any]:
    if not store.exists(path):
        raise InputError(f"{path}: no such file; embed first")
    if store.is_local(path) and not os.path.isfile(path):
        raise InputError(f"{path}: not a regular file; give a .npy file, or a folder with img_emb/")
    matrix = map_npy(path, "embed again")
    if matrix.dtype not in (np.float16, np.float32) or matrix.ndim != 2 or not matrix.shape[1]:
        raise InputError(
            f"{path}: expected float16 or float32 features [rows, dim], found {matrix.dtype}"
            f" {list(matrix.shape)}"
        )
    return matrix


def _unit(block_BD: Float32Array) -> Float32Array:
    """Normalise rows that have unit length within float16's rounding; later checks refuse the others."""
    length_B1 = np.linalg.norm(block_BD, axis=1, keepdims=True)
    unit: Float32Array = np.where(
        np.abs(length_B1 - 1) < 5e-3, block_BD / np.maximum(length_B1, 0.5), block_BD
    )
    return unit
