"""Indices over embeddings that do not fit into memory: in parts, memory-mapped, resumable.

A folder written by `build_parts`:

    index.json           factory, dim, rows, the model of the features where known, and the parts; written
                         last: it existing means complete
    plan.json            digest of embeddings and settings, so that parts of two indices never mix
    trained.index        the empty trained index that every part is a copy of
    parts/00000.index    rows 0 … rows_per_part - 1 as a plain FAISS file, ids from 0 within the part

Embeddings are `.npy` files, float16 or float32, unit-norm: a file, a folder of them, or clip-retrieval's
folder with `img_emb/img_emb_N.npy` and `text_emb/text_emb_N.npy`. They are read a block at a time.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.features.layout import EMBEDDING_FOLDERS, Side, check_vectors
from eval.features.model_identity import ModelIdentity, read_identity
from eval.index.device import Device, check_device, from_device, to_device
from eval.index.flat import faiss_reason
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.config import digest
from pipeline.core.foreign import parse_json
from pipeline.core.npy import map_npy
from pipeline.core.records import ConfigError, InputError
from pipeline.core.stage import Progress

BLOCK_ROWS = 65_536  # read, checked and added at once: 128 MiB of float32 at 512


@dataclass(frozen=True, slots=True)
class Embeddings:
    """`.npy` files one after another, as if they were one matrix."""

    paths: tuple[str, ...]
    first_rows: tuple[int, ...]  # of each file, and the number of all rows at the end
    dim: int
    model: ModelIdentity | None = None  # None where nothing says

    @property
    def num_rows(self) -> int:
        return self.first_rows[-1]

    @classmethod
    def open(cls, source: str, *, side: Side = "image") -> "Embeddings":
        """Read the headers of all files. Raises InputError for none, other types, and mixed widths."""
        paths = _npy_files(source, side)
        first_rows, dim = [0], 0
        for path in paths:
            matrix = _open_npy(path)
            if dim and matrix.shape[1] != dim:
                raise InputError(
                    f"{path}: features of width {matrix.shape[1]}, but {paths[0]} has {dim}: of another model"
                )
            dim = matrix.shape[1]
            first_rows.append(first_rows[-1] + len(matrix))
        if not first_rows[-1]:
            raise InputError(f"{source}: holds files of features, but not one row")
        return cls(tuple(paths), tuple(first_rows), dim, read_identity(source))

    def blocks(self, start: int, stop: int) -> Iterator[Float32Array]:
        """Rows start … stop - 1 as checked float32 blocks, in order.

        Raises InputError naming file and row for features that are NaN or not unit-norm.
        """
        for path, first, end in zip(self.paths, self.first_rows, self.first_rows[1:], strict=False):
            low, high = max(start, first), min(stop, end)
            if low >= high:
                continue
            matrix = _open_npy(path)
            for row in range(low, high, BLOCK_ROWS):
                last = min(row + BLOCK_ROWS, high)
                block_BD = np.array(matrix[row - first : last - first], dtype=np.float32)
                # float16 keeps three digits: bring the length back before it is judged and used
                if matrix.dtype == np.float16:
                    block_BD = _unit(block_BD)
                check_vectors(block_BD, f"{path} from row {row - first}")
                yield block_BD

    def rows(self, wanted: Int64Array) -> Float32Array:
        """These rows (ascending), gathered file by file."""
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
        """Of names, sizes, and the first and last MiB of each file: reading terabytes is not worth more."""
        return digest([(os.path.basename(path), *store.digest_edges(path)) for path in self.paths])


@dataclass(frozen=True, slots=True)
class Part:
    """One FAISS file and which rows it holds."""

    path: str  # relative to the index's folder
    first_row: int
    num_rows: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PartedIndex:
    """What `index.json` says."""

    folder: str
    factory: str
    dim: int
    num_rows: int
    inputs: str  # digest of embeddings and settings
    parts: tuple[Part, ...]
    model: ModelIdentity | None = None  # None where nothing said it

    @classmethod
    def open(cls, folder: str) -> "PartedIndex":
        """Raises InputError where the folder holds no complete index."""
        path = store.join(folder, "index.json")
        try:
            fields = parse_json(store.read_text(path))
            parts = tuple(Part(**part) for part in fields.pop("parts"))
            model = fields.pop("model", None)
            return cls(
                folder=folder, parts=parts, model=None if model is None else ModelIdentity(**model), **fields
            )
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such file; build the index: cnclip index (it goes on where it stopped)"
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: not an index's description ({error}); build it again") from None

    @property
    def bytes_per_vector(self) -> float:
        return sum(part.num_bytes for part in self.parts) / self.num_rows

    def search(
        self, queries_QD: Float32Array, k: int, *, parameters: str = ""
    ) -> tuple[Float32Array, Int64Array]:
        """The k best rows of each query over all parts: (scores, rows), best first, ties by lower row.

        One part is mapped at a time. `parameters` is FAISS's string, such as `nprobe=16`. Rows that were not
        found are -1. Raises InputError for queries of another width and for k above the number of rows.
        """
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.dim:
            raise InputError(
                f"{self.folder}: queries of shape {list(queries_QD.shape)} do not fit an index of width"
                f" {self.dim}: it is of another model"
            )
        if not 0 < k <= self.num_rows:
            raise InputError(f"{self.folder}: k = {k}, but the index holds {self.num_rows} rows")
        queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
        best = (
            np.full((len(queries_QD), k), -np.inf, dtype=np.float32),
            np.full((len(queries_QD), k), -1, dtype=np.int64),
        )
        for part in self.parts:
            index = map_index(store.join(self.folder, part.path))
            set_parameters(index, parameters)
            scores_QK, rows_QK = index.search(queries_QD, min(k, part.num_rows))
            rows_QK = np.where(rows_QK >= 0, rows_QK + part.first_row, -1)
            scores_QK = np.where(rows_QK >= 0, scores_QK, -np.inf)
            best = _merge(best, (scores_QK, rows_QK), k)
        return best


def build_parts(
    embeddings: Embeddings,
    folder: str,
    *,
    factory: str,
    rows_per_part: int,
    train_rows: int,
    device: Device = "cpu",
    redo: bool = False,
    progress: Progress | None = None,
) -> PartedIndex:
    """Train on evenly spaced rows, then index part by part; what is there already is kept.

    `device` trains and adds. The same embeddings and settings give the same bytes on one thread of the
    processor. Raises ConfigError where the folder holds an index of other embeddings or settings and `redo`
    is not set, and where there is no such device; InputError for a factory string that FAISS refuses.
    """
    check_device(device)
    if rows_per_part < 1 or train_rows < 1:
        raise ConfigError("rows per part and rows to train on must be at least 1")
    inputs = digest([embeddings.digest(), factory, rows_per_part, train_rows])
    plan_path = store.join(folder, "plan.json")
    if store.exists(plan_path) and store.read_text(plan_path) != inputs:
        if not redo:
            raise ConfigError(
                f"{folder}: holds an index of other embeddings or settings; give --redo or another folder"
            )
        for name in ("index.json", "trained.index", "parts"):
            store.remove(store.join(folder, name))
    store.write_text(plan_path, inputs)

    trained_path = store.join(folder, "trained.index")
    if not store.exists(trained_path):
        _write_index(train(embeddings, factory, train_rows, device), trained_path)
    parts = []
    starts = range(0, embeddings.num_rows, rows_per_part)
    for number, start in enumerate(starts):
        stop = min(start + rows_per_part, embeddings.num_rows)
        name = f"parts/{number:05d}.index"
        path = store.join(folder, name)
        if not store.exists(path):
            index = to_device(map_index(trained_path, mapped=False), device, factory)
            for block_BD in embeddings.blocks(start, stop):
                index.add(block_BD)
            _write_index(from_device(index, device), path)
        parts.append(Part(name, start, stop - start, store.num_bytes(path)))
        if progress is not None:
            progress(number + 1, len(starts), name)
    result = PartedIndex(
        folder, factory, embeddings.dim, embeddings.num_rows, inputs, tuple(parts), embeddings.model
    )
    fields = asdict(result)
    del fields["folder"]
    store.write_text(store.join(folder, "index.json"), json.dumps(fields, indent=1))
    return result


def new_index(dim: int, factory: str) -> Any:
    """An empty inner-product index. Raises InputError for a string that the installed FAISS refuses."""
    import faiss

    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"FAISS refuses the index {factory!r} at width {dim}: {faiss_reason(error)}"
        ) from None


def map_index(path: str, *, mapped: bool = True) -> Any:
    """A FAISS file, memory-mapped where its kind allows (inverted lists, flat codes).

    Raises InputError for a missing or damaged file.
    """
    import faiss

    flags = faiss.IO_FLAG_MMAP_IFC if mapped else 0
    try:
        return faiss.read_index(path, flags)
    except RuntimeError as error:
        raise InputError(
            f"{path}: not a readable FAISS index ({faiss_reason(error)}); remove it and build again"
        ) from None


def set_parameters(index: Any, parameters: str, device: Device = "cpu") -> None:
    """FAISS's search parameters, such as `nprobe=16`. ConfigError where they do not apply."""
    import faiss

    if not parameters:
        return
    kind = faiss.ParameterSpace if device == "cpu" else faiss.GpuParameterSpace
    space: Any = kind()  # FAISS's stubs know one of its two signatures
    try:
        space.set_index_parameters(index, parameters)
    except RuntimeError as error:
        raise ConfigError(f"search parameters {parameters!r}: {faiss_reason(error)}") from None


def train(embeddings: Embeddings, factory: str, train_rows: int, device: Device) -> Any:
    """An empty index trained on evenly spaced rows. Raises InputError where FAISS refuses string or rows."""
    index = new_index(embeddings.dim, factory)
    if index.is_trained:
        return index
    count = min(train_rows, embeddings.num_rows)
    rows = np.arange(count) * embeddings.num_rows // count
    index = to_device(index, device, factory)
    try:
        index.train(embeddings.rows(rows))
    except RuntimeError as error:
        raise InputError(f"FAISS cannot train {factory!r} on {count} rows: {faiss_reason(error)}") from None
    return from_device(index, device)


def _write_index(index: Any, path: str) -> None:
    import faiss

    with store.publish(path) as temporary:
        faiss.write_index(index, temporary)


def _merge(
    first: tuple[Float32Array, Int64Array], second: tuple[Float32Array, Int64Array], k: int
) -> tuple[Float32Array, Int64Array]:
    scores = np.concatenate([first[0], second[0]], axis=1)
    rows = np.concatenate([first[1], second[1]], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


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
    matrix = map_npy(path, "embed again")
    if matrix.dtype not in (np.float16, np.float32) or matrix.ndim != 2 or not matrix.shape[1]:
        raise InputError(
            f"{path}: expected float16 or float32 features [rows, dim], found {matrix.dtype}"
            f" {list(matrix.shape)}"
        )
    return matrix


def _unit(block_BD: Float32Array) -> Float32Array:
    """Unit length, where the length was within float16's rounding of 1; other rows are left to be refused."""
    length_B1 = np.linalg.norm(block_BD, axis=1, keepdims=True)
    unit: Float32Array = np.where(
        np.abs(length_B1 - 1) < 5e-3, block_BD / np.maximum(length_B1, 0.5), block_BD
    )
    return unit
