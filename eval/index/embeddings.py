"""Reads vectors that do not fit into memory from a sequence of files, one block at a time."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eval.features.layout import EMBEDDING_FOLDERS, Side
from eval.features.model_identity import ModelIdentity, read_identity
from eval.index.formats.files import open_matrix
from eval.index.formats.hdf5 import metric_of
from eval.index.formats.matrix import BIN, HDF5, VECS, Role, file_of, is_vectors, suffix_of
from eval.index.metric import METRICS, Metric, prepared
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.config import digest
from pipeline.core.records import ConfigError, InputError

BLOCK_ROWS = 65_536  # read, checked and added at once: 128 MiB of float32 at 512


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A sequence of files that acts as one matrix."""

    paths: tuple[str, ...]
    first_rows: tuple[int, ...]  # of each file, followed by the total number of rows
    dim: int
    model: ModelIdentity | None = None  # None if unknown
    metric: Metric = "cosine"
    normalises: bool = False  # brings rows to unit length; otherwise those for cosine must have it
    role: Role = "rows"  # which data set of an HDF5 file

    @property
    def num_rows(self) -> int:
        return self.first_rows[-1]

    @property
    def asked_metric(self) -> Metric | None:
        """Return the metric with which other vectors are opened to fit these."""
        return None if self.metric == "cosine" and not self.normalises else self.metric

    @classmethod
    def open(
        cls, source: str, *, side: Side = "image", metric: Metric | None = None, role: Role = "rows"
    ) -> "Embeddings":
        """Read the headers of all files.

        Args:
            source: a file of `eval.index.formats.matrix`, a folder of .npy files, or clip-retrieval's folder.
            side: which side of clip-retrieval's folder.
            metric: how to compare them; "cosine" brings rows to unit length. None: cosine of rows that have
                it, or what an HDF5 file names.
            role: whether the rows of an HDF5 file are wanted, or its queries.

        Raises:
            InputError: if there are no files, and for other types and mixed widths.
            ConfigError: for an unknown metric, and for none if the files do not say it.
        """
        chosen, normalises = _metric_of(source, metric)
        paths = _files(source, side)
        first_rows, dim = [0], 0
        for path in paths:
            num_rows, width = open_matrix(path, role).shape
            if dim and width != dim:
                raise InputError(
                    f"{path}: features of width {width}, but {paths[0]} has {dim}: they come from different"
                    " models"
                )
            dim = width
            first_rows.append(first_rows[-1] + num_rows)
        if not first_rows[-1]:
            raise InputError(f"{source}: holds files of features, but no rows")
        model = read_identity(source) if os.path.splitext(source)[1] in ("", ".npy") else None
        return cls(tuple(paths), tuple(first_rows), dim, model, chosen, normalises, role)

    def blocks(self, start: int, stop: int) -> Iterator[Float32Array]:
        """Yield rows start … stop - 1 as checked float32 blocks, in order.

        Raises:
            InputError: for features that are NaN or not unit-norm; it names file and row.
        """
        for path, first, end in zip(self.paths, self.first_rows, self.first_rows[1:], strict=False):
            low, high = max(start, first), min(stop, end)
            if low >= high:
                continue
            matrix = open_matrix(path, self.role)
            for row in range(low, high, BLOCK_ROWS):
                last = min(row + BLOCK_ROWS, high)
                numbers_B = np.arange(row - first, last - first)
                yield self._prepared(matrix.block(row - first, last - first), path, numbers_B)

    def rows(self, wanted: Int64Array) -> Float32Array:
        """Return these rows (ascending), gathered file by file."""
        parts = []
        for path, first, end in zip(self.paths, self.first_rows, self.first_rows[1:], strict=False):
            inside = wanted[(wanted >= first) & (wanted < end)] - first
            if len(inside):
                matrix = open_matrix(path, self.role)
                parts.append(self._prepared(matrix.rows(inside), path, inside))
        return np.concatenate(parts)

    def _prepared(self, rows_BD: np.ndarray, path: str, numbers_B: Int64Array) -> Float32Array:
        """Return checked rows in float32."""
        block_BD = rows_BD.astype(np.float32)
        # float16 keeps three digits: restore the length before checking and using it
        if rows_BD.dtype == np.float16 and self.metric == "cosine":
            block_BD = _unit(block_BD)
        return prepared(block_BD, self.metric, path, normalise=self.normalises, numbers_N=numbers_B)

    def digest(self) -> str:
        """Hash names, sizes, and the first and last MiB of each file, which avoids reading terabytes."""
        return self.digest_of(len(self.paths))

    def digest_of(self, num_files: int) -> str:
        """Hash the first files as `digest` hashes all."""
        paths = self.paths[:num_files]
        files = [(os.path.basename(path), *store.digest_edges(file_of(path))) for path in paths]
        return digest(files if self.asked_metric is None else [*files, self.metric, self.role])


def _metric_of(source: str, metric: Metric | None) -> tuple[Metric, bool]:
    """Return how to compare vectors, and whether to bring them to unit length."""
    if metric is not None:
        if metric not in METRICS:
            raise ConfigError(f"--metric {metric}: give one of {', '.join(METRICS)}")
        return metric, metric == "cosine"
    suffix = suffix_of(source)
    if suffix in HDF5 and os.path.isfile(source):
        return metric_of(source), True
    if suffix in BIN or suffix in VECS:
        raise ConfigError(
            f"{source}: {suffix} files do not say how to compare vectors; give --metric cosine, ip or l2"
        )
    return "cosine", False


def _files(source: str, side: Side) -> list[str]:
    if is_vectors(source):
        return [source]
    if store.is_local(source) and not os.path.exists(source):
        raise InputError(f"{source}: no such file or folder; give vectors or a folder of features")
    inner = store.join(source, EMBEDDING_FOLDERS[side])
    folder = inner if store.list_files(inner) else source
    names = [store.join(folder, name) for name in store.list_files(folder) if name.endswith(".npy")]
    if not names:
        raise InputError(
            f"{source}: holds no .npy features; give a file of vectors (.npy, .fbin, .fvecs, .hdf5, .parquet"
            f" …), a folder of .npy files, or one with {EMBEDDING_FOLDERS[side]}/"
        )
    # img_emb_10.npy comes after img_emb_9.npy
    return sorted(
        names, key=lambda name: [int(text) if text.isdigit() else text for text in re.split(r"(\d+)", name)]
    )


def _unit(block_BD: Float32Array) -> Float32Array:
    """Normalise rows that have unit length within float16's rounding; later checks refuse the others."""
    length_B1 = np.linalg.norm(block_BD, axis=1, keepdims=True)
    unit: Float32Array = np.where(
        np.abs(length_B1 - 1) < 5e-3, block_BD / np.maximum(length_B1, 0.5), block_BD
    )
    return unit
