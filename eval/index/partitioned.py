"""Builds indices over embeddings that do not fit into memory: in parts, memory-mapped, resumable.

Embeddings are read one block at a time.
docs/reference/formats.md, "Features and indices", has the layout of the folder that `build_parts` writes.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from eval.features.model_identity import ModelIdentity
from eval.index.build import DEFAULT_TRAIN_ROWS, fill, train
from eval.index.device import Device, check_device
from eval.index.embeddings import Embeddings as Embeddings
from eval.index.files import faiss_reason, load_index, vouch, write_index
from eval.index.metric import METRICS, Metric
from eval.index.structure import limit_search
from eval.index.tuning.parameters import Tuned, set_parameters
from eval.index.tuning.tune import Tuning, tune_index
from eval.index.views import Centred, Vectors, mean_of
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.config import digest
from pipeline.core.files.foreign import parse_json
from pipeline.core.files.lock import exclusive
from pipeline.core.files.npy import read_npy
from pipeline.core.files.written import write_npy
from pipeline.core.records import ConfigError, InputError
from pipeline.core.stage import Progress

CENTRE = "centre.npy"
_DIGESTED_BYTES = 4 << 30  # indices up to this size are hashed on opening, which takes seconds


@dataclass(frozen=True, slots=True)
class Part:
    """One FAISS file and the rows in it."""

    path: str  # relative to the index's folder
    first_row: int
    num_rows: int
    num_bytes: int
    digest: str = ""  # sha256 of the bytes, hex; empty in old indices without digests


@dataclass(frozen=True, slots=True)
class PartedIndex:
    """The contents of `index.json`."""

    folder: str
    factory: str
    dim: int
    num_rows: int
    inputs: str  # digest of embeddings and settings
    parts: tuple[Part, ...]
    model: ModelIdentity | None = None  # None if unknown
    tuned: Tuned | None = None  # `search` in the file; None for an index that was not tuned
    centre: str | None = None  # sha256 of centre.npy, the mean that was subtracted from all rows
    metric: Metric = "cosine"

    @classmethod
    def open(cls, folder: str) -> "PartedIndex":
        """Read the description of an index and check its parts.

        Raises:
            InputError: if the folder holds no complete index, or a part has changed.
        """
        index = cls.read(folder)
        read_all = sum(part.num_bytes for part in index.parts) <= _DIGESTED_BYTES
        for part in index.parts:
            if reason := index.damage(part, read_all=read_all):
                raise InputError(
                    f"{store.join(folder, part.path)}: not a readable FAISS index ({reason}); build it again:"
                    " cnclip index"
                )
        index.mean()
        return index

    @classmethod
    def read(cls, folder: str) -> "PartedIndex":
        """Read only the description, without a look at the parts.

        Raises:
            InputError: if it is missing or damaged.
        """
        path = store.join(folder, "index.json")
        try:
            fields = parse_json(store.read_text(path))
            parts = tuple(Part(**part) for part in fields.pop("parts"))
            model, tuned = fields.pop("model", None), fields.pop("search", None)
            index = cls(
                folder=folder,
                parts=parts,
                model=None if model is None else ModelIdentity(**model),
                tuned=None if tuned is None else Tuned(**tuned),
                **fields,
            )
            index.check()
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such file; build the index: cnclip index (it resumes where it stopped)"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: not an index's description ({error}); build it again") from None
        return index

    def check(self) -> None:
        """Check that the parts are contiguous and complete.

        Raises:
            ValueError: if they do not.
        """
        for name, value in (("factory", self.factory), ("inputs", self.inputs)):
            if not isinstance(value, str):
                raise ValueError(f"{name} is not text")
        if not isinstance(self.centre, str | None):
            raise ValueError("centre is not text")
        if self.metric not in METRICS:
            raise ValueError(f"its metric is none of {', '.join(METRICS)}")
        if self.tuned is not None:
            self.tuned.check()
        row = 0
        for number, part in enumerate(self.parts):
            counts = (part.first_row, part.num_rows, part.num_bytes)
            if any(type(count) is not int for count in counts) or not isinstance(part.digest, str):
                raise ValueError(f"part {number} is described by other than numbers")
            if part.path != _part_name(number) or part.first_row != row or part.num_rows < 1:
                raise ValueError(
                    f"part {number} is {part.path!r}, {part.num_rows} rows from {part.first_row}"
                )
            row += part.num_rows
        if (
            type(self.dim) is not int
            or type(self.num_rows) is not int
            or self.dim < 1
            or not 0 < row == self.num_rows
        ):
            raise ValueError(f"{self.num_rows} rows of width {self.dim}, but its parts have {row}")

    def damage(self, part: Part, *, read_all: bool) -> str | None:
        """Return how a part differs from the file that was written, or None."""
        path = store.join(self.folder, part.path)
        try:
            found = store.num_bytes(path)
            if found != part.num_bytes:
                return f"{found} of {part.num_bytes} bytes"
            if read_all and part.digest:
                if store.digest_file(path) != part.digest:
                    return "its bytes have changed"
                vouch(path)
        except FileNotFoundError:
            return "no such file"
        return None

    @property
    def bytes_per_vector(self) -> float:
        return sum(part.num_bytes for part in self.parts) / self.num_rows

    def mean(self) -> Float32Array | None:
        """Return the mean that was subtracted from all rows, float32 [dim], or None.

        Raises:
            InputError: if its file is missing or has changed.
        """
        if self.centre is None:
            return None
        path = store.join(self.folder, CENTRE)
        mean_D = read_npy(path, "build the index again")
        if store.digest_file(path) != self.centre or mean_D.shape != (self.dim,):
            raise InputError(f"{path}: its bytes have changed; build the index again: cnclip index --redo")
        return np.asarray(mean_D, dtype=np.float32)

    def search(
        self, queries_QD: Float32Array, k: int, *, parameters: str | None = None
    ) -> tuple[Float32Array, Int64Array]:
        """Return the k best rows of each query over all parts: (scores, rows), best first, ties by lower row.

        Only one part is mapped at a time. `parameters` is FAISS's string, such as `nprobe=16`, or empty for
        FAISS's defaults; without it the index searches with the parameters that it was tuned to. Rows that
        were not found are -1.

        Raises:
            InputError: for queries of another width and for k above the number of rows.
        """
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.dim:
            raise InputError(
                f"{self.folder}: queries of shape {list(queries_QD.shape)} do not fit an index of width"
                f" {self.dim}: it belongs to another model"
            )
        if not 0 < k <= self.num_rows:
            raise InputError(f"{self.folder}: k = {k}, but the index holds {self.num_rows} rows")
        if parameters is None:
            parameters = self.tuned.parameters if self.tuned is not None else ""
        queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
        mean_D = self.mean()
        best = (
            np.full((len(queries_QD), k), -np.inf, dtype=np.float32),
            np.full((len(queries_QD), k), -1, dtype=np.int64),
        )
        for part in self.parts:
            path = store.join(self.folder, part.path)
            index = load_index(path, metric=self.metric)
            if (index.d, index.ntotal) != (self.dim, part.num_rows):
                raise InputError(
                    f"{path}: {index.ntotal} rows of width {index.d}, but index.json has {part.num_rows} of"
                    f" {self.dim}; build it again: cnclip index --redo"
                )
            set_parameters(index, parameters)
            limit_search(index)
            try:
                scores_QK, rows_QK = index.search(queries_QD, min(k, part.num_rows))
            except Exception as error:
                raise InputError(f"{path}: FAISS cannot search it ({faiss_reason(error)})") from None
            rows_QK = np.where(rows_QK >= 0, rows_QK + part.first_row, -1)
            if self.metric == "l2":
                scores_QK = -scores_QK
            scores_QK = np.where(rows_QK >= 0, scores_QK, -np.inf)
            best = _merge(best, (scores_QK, rows_QK), k)
        if mean_D is not None:
            best[0][:] += (queries_QD @ mean_D)[:, None]
        return (-best[0], best[1]) if self.metric == "l2" else best


def build_parts(
    embeddings: Embeddings,
    folder: str,
    *,
    factory: str,
    rows_per_part: int,
    train_rows: int,
    device: Device = "cpu",
    redo: bool = False,
    centre: bool = False,
    tuning: Tuning | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> PartedIndex:
    """Train on evenly spaced rows, then index part by part, keeping intact parts that already exist.

    Training and adding run on `device`. The same embeddings and settings give the same bytes on one CPU
    thread. With `centre` the rows' mean is subtracted from all of them and added to the scores again.
    `tuning` finds the search parameters, unless the folder has those of the same queries and target.
    `progress` counts rows. `say` gets a line for each damaged file that is rebuilt.

    Raises:
        ConfigError: if the folder holds an index of other embeddings or settings and `redo` is not set, or
            the device does not exist.
        InputError: for a factory string that FAISS refuses or that does not search by inner product, and if
            another command is working in the folder.
    """
    check_device(device)
    if rows_per_part < 1 or train_rows < 1:
        raise ConfigError("rows per part and rows to train on must be at least 1")
    if centre and embeddings.metric == "l2":
        raise ConfigError("--centre is for inner products; distances do not change when rows are moved")
    with exclusive(folder):
        bound = [embeddings.digest(), factory, rows_per_part, train_rows]
        inputs = digest([*bound, "centre"] if centre else bound)
        _begin(folder, inputs, redo)
        earlier = _described(folder, inputs)
        mean_D = _mean(embeddings, folder) if centre else None
        vectors = embeddings if mean_D is None else Centred(embeddings, mean_D)
        trained = _Trained(vectors, folder, factory, train_rows, device, say or (lambda line: None), progress)
        before = {} if earlier is None else dict(enumerate(earlier.parts))
        starts = range(0, embeddings.num_rows, rows_per_part)
        parts = []
        for number, start in enumerate(starts):
            stop = min(start + rows_per_part, embeddings.num_rows)
            part = before.get(number)
            if part is None or not part.digest:
                part = Part(_part_name(number), start, stop - start, 0)
            parts.append(trained.part(part))
        result = PartedIndex(
            folder, factory, embeddings.dim, embeddings.num_rows, inputs, tuple(parts), embeddings.model
        )
        result = replace(result, metric=embeddings.metric)
        if centre:
            result = replace(result, centre=store.digest_file(store.join(folder, CENTRE)))
        known = None if earlier is None else earlier.tuned
        if tuning is None or (known is not None and tuning.is_of(known)):
            result = replace(result, tuned=known)
        else:
            result = replace(result, tuned=_tune(result, embeddings, tuning))
        fields = asdict(result)
        fields["search"] = fields.pop("tuned")
        for name, usual in (("search", None), ("centre", None), ("metric", "cosine")):
            if fields[name] == usual:
                del fields[name]
        del fields["folder"]
        store.write_text(store.join(folder, "index.json"), json.dumps(fields, indent=1))
    return result


def _begin(folder: str, inputs: str, redo: bool) -> None:
    """Bind the folder to these inputs."""
    plan_path = store.join(folder, "plan.json")
    if store.exists(plan_path) and store.read_bytes(plan_path) != inputs.encode():
        if not redo:
            raise ConfigError(
                f"{folder}: holds an index of other embeddings or settings; give --redo or another folder"
            )
        for name in ("index.json", "trained.index", CENTRE, "parts"):
            store.remove(store.join(folder, name))
    store.sweep(folder)
    store.write_text(plan_path, inputs)


def _described(folder: str, inputs: str) -> PartedIndex | None:
    """Return what the folder says of a finished index of these inputs, or None."""
    try:
        before = PartedIndex.read(folder)
    except InputError:
        return None
    return before if before.inputs == inputs else None


def _mean(embeddings: Embeddings, folder: str) -> Float32Array:
    """Return the mean of the rows, and write it into the folder."""
    mean_D = mean_of(embeddings, DEFAULT_TRAIN_ROWS)
    write_npy(store.join(folder, CENTRE), mean_D)
    return mean_D


def _tune(index: PartedIndex, embeddings: Embeddings, tuning: Tuning) -> Tuned:
    """Find the search parameters of an index whose parts are written."""

    def search(queries_QD: Float32Array, k: int, parameters: str) -> Int64Array:
        return index.search(queries_QD, k, parameters=parameters)[1]

    first = load_index(store.join(index.folder, index.parts[0].path), metric=index.metric)
    return tune_index(first, search, embeddings, tuning)


@dataclass(frozen=True, slots=True)
class _Trained:
    """The trained index from which all parts start, made when the first part needs it."""

    vectors: Vectors
    folder: str
    factory: str
    train_rows: int
    device: Device
    say: Callable[[str], None]
    progress: Progress | None

    def show(self, num_rows: int) -> None:
        """Show the number of rows in the parts."""
        if self.progress is not None:
            self.progress(num_rows, self.vectors.num_rows)

    def part(self, part: Part) -> Part:
        """Return the part in the folder, and build it if it is missing or damaged."""
        path = store.join(self.folder, part.path)
        if store.exists(path):
            try:
                whole = self._checked(part, path)
            except InputError as error:
                self.say(f"{error}: built again")
            else:
                self.show(part.first_row + part.num_rows)
                return whole
        start, stop = part.first_row, part.first_row + part.num_rows

        def added(count: int) -> None:
            self.show(start + count)

        index = fill(self._empty(), self.vectors, start, stop, self.factory, self.device, added)
        num_bytes, found = write_index(index, path)
        return replace(part, num_bytes=num_bytes, digest=found)

    def _checked(self, part: Part, path: str) -> Part:
        num_bytes, found = store.num_bytes(path), store.digest_file(path)
        if part.digest:
            if (num_bytes, found) != (part.num_bytes, part.digest):
                raise InputError(f"{path}: its bytes have changed")
        else:
            index = load_index(path, metric=self.vectors.metric)
            if (index.d, index.ntotal) != (self.vectors.dim, part.num_rows):
                raise InputError(f"{path}: {index.ntotal} rows of width {index.d}, {part.num_rows} wanted")
        vouch(path)
        return replace(part, num_bytes=num_bytes, digest=found)

    def _empty(self) -> Any:
        path = store.join(self.folder, "trained.index")
        if store.exists(path):
            try:
                return load_index(path, mapped=False, metric=self.vectors.metric)
            except InputError as error:
                self.say(f"{error}: built again")
        write_index(train(self.vectors, self.factory, self.train_rows, self.device), path)
        return load_index(path, mapped=False, metric=self.vectors.metric)


def _part_name(number: int) -> str:
    return f"parts/{number:05d}.index"


def _merge(
    first: tuple[Float32Array, Int64Array], second: tuple[Float32Array, Int64Array], k: int
) -> tuple[Float32Array, Int64Array]:
    scores = np.concatenate([first[0], second[0]], axis=1)
    rows = np.concatenate([first[1], second[1]], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
