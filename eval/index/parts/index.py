"""`index.json`: an index in parts, which is searched as one."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from eval.features.model_identity import ModelIdentity
from eval.index.files import vouch
from eval.index.metric import METRICS, Metric
from eval.index.parts.opened import Opened, Searcher
from eval.index.parts.part import Part, part_name
from eval.index.parts.selection import Allowed, Mask, mask_of
from eval.index.tuning.parameters import Tuned
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.files.foreign import parse_json
from pipeline.core.files.npy import read_npy
from pipeline.core.records import InputError

CENTRE, REMOVED = "centre.npy", "removed.npy"
_DIGESTED_BYTES = 4 << 30  # indices up to this size are hashed on opening, which takes seconds
_USUAL = {"search": None, "centre": None, "metric": "cosine", "removed": None}  # left out of the file


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
    removed: str | None = None  # sha256 of removed.npy, the rows that do not answer
    settings: tuple[int, int] | None = None  # rows of a part and of the training; None in old indices
    opened: Opened = field(default_factory=Opened, compare=False, repr=False)

    @classmethod
    def open(cls, folder: str, *, keep_open: bool = True) -> "PartedIndex":
        """Read the description of an index and check its parts.

        Without `keep_open`, searches have one part in memory at a time.

        Raises:
            InputError: if the folder holds no complete index, or a part has changed.
        """
        index = cls.read(folder)
        if not keep_open:
            index.opened.keeps = False
        read_all = sum(part.num_bytes for part in index.parts) <= _DIGESTED_BYTES
        for part in index.parts:
            if reason := index.damage(part, read_all=read_all):
                raise InputError(
                    f"{store.join(folder, part.path)}: not a readable FAISS index ({reason}); build it again:"
                    " cnclip index"
                )
        index.mean()
        index.removed_rows()
        return index

    @classmethod
    def read(cls, folder: str) -> "PartedIndex":
        """Read only the description, without a look at the parts.

        Raises:
            InputError: if it is missing or damaged.
        """
        path = store.join(folder, "index.json")
        try:
            read = parse_json(store.read_text(path))
            parts = tuple(Part(**part) for part in read.pop("parts"))
            model, tuned = read.pop("model", None), read.pop("search", None)
            settings = read.pop("settings", None)
            index = cls(
                folder=folder,
                parts=parts,
                model=None if model is None else ModelIdentity(**model),
                tuned=None if tuned is None else Tuned(**tuned),
                settings=None if settings is None else tuple(settings),
                **read,
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
        if not isinstance(self.centre, str | None) or not isinstance(self.removed, str | None):
            raise ValueError("centre or removed is not text")
        if self.settings is not None and (
            len(self.settings) != 2 or any(type(count) is not int or count < 1 for count in self.settings)
        ):
            raise ValueError("settings are two numbers of rows")
        if self.metric not in METRICS:
            raise ValueError(f"its metric is none of {', '.join(METRICS)}")
        if self.tuned is not None:
            self.tuned.check()
        row = 0
        for number, part in enumerate(self.parts):
            counts = (part.first_row, part.num_rows, part.num_bytes)
            if any(type(count) is not int for count in counts) or not isinstance(part.digest, str):
                raise ValueError(f"part {number} is described by other than numbers")
            if part.path != part_name(number) or part.first_row != row or part.num_rows < 1:
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
        if self.opened.mean_D is not None:
            return self.opened.mean_D
        path = store.join(self.folder, CENTRE)
        mean_D = read_npy(path, "build the index again")
        if store.digest_file(path) != self.centre or mean_D.shape != (self.dim,):
            raise InputError(f"{path}: its bytes have changed; build the index again: cnclip index --redo")
        self.opened.mean_D = np.asarray(mean_D, dtype=np.float32)
        return self.opened.mean_D

    def removed_rows(self) -> Int64Array:
        """Return the rows that do not answer, ascending.

        Raises:
            InputError: if their file is missing or has changed.
        """
        if self.removed is None:
            return np.zeros(0, dtype=np.int64)
        path = store.join(self.folder, REMOVED)
        remedy = "remove the rows again: cnclip prune-index"
        rows_R = read_npy(path, remedy)
        if store.digest_file(path) != self.removed or rows_R.dtype != np.int64 or rows_R.ndim != 1:
            raise InputError(f"{path}: its bytes have changed; {remedy}")
        if len(rows_R) and not 0 <= rows_R.min() <= rows_R.max() < self.num_rows:
            raise InputError(f"{path}: rows outside of {self.num_rows}; {remedy}")
        return np.asarray(rows_R)

    def write(self) -> None:
        """Write `index.json`; what is as usual is left out."""
        body: dict[str, Any] = {
            "search" if each.name == "tuned" else each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in ("folder", "opened")
        }
        for name, usual in _USUAL.items():
            if body[name] == usual:
                del body[name]
        text = json.dumps(body, indent=1, default=asdict)
        store.write_text(store.join(self.folder, "index.json"), text)

    def search(
        self,
        queries_QD: Float32Array,
        k: int,
        *,
        parameters: str | None = None,
        rows: "Sequence[int] | Int64Array | Mask | None" = None,
    ) -> tuple[Float32Array, Int64Array]:
        """Return the k best rows of each query over all parts: (scores, rows), best first, ties by lower row.

        Parts stay open between searches if they fit into half of the available memory; otherwise one is open
        at a time.

        Args:
            queries_QD: the queries.
            k: rows for each.
            parameters: FAISS's string, such as `nprobe=16`, or empty for FAISS's defaults (default: what the
                index was tuned to).
            rows: only these may answer: their numbers, or a mask [num_rows].

        Rows that were not found are -1. Scores are inner products, or squared distances for L2.

        Raises:
            InputError: for queries of another width, for k above the number of rows, and for a kind of index
                that FAISS cannot filter.
        """
        if not 0 < k <= self.num_rows:
            raise InputError(f"{self.folder}: k = {k}, but the index holds {self.num_rows} rows")
        queries_QD = self._fitting(queries_QD)
        mean_D = self.mean()
        scores_QK, rows_QK = self._searcher(parameters, rows).nearest(queries_QD, k)
        if mean_D is not None:
            scores_QK += (queries_QD @ mean_D)[:, None]
        return -scores_QK if self.metric == "l2" else scores_QK, rows_QK

    def search_range(
        self,
        queries_QD: Float32Array,
        radius: float,
        *,
        parameters: str | None = None,
        rows: "Sequence[int] | Int64Array | Mask | None" = None,
    ) -> Iterator[tuple[Float32Array, Int64Array]]:
        """Yield (scores, rows) for each query: all rows found with a score of at least `radius`, best first.

        For L2 these are rows at a squared distance of at most `radius`. Other arguments and errors are those
        of `search`.
        """
        queries_QD = self._fitting(queries_QD)
        if not len(queries_QD):
            return
        mean_D, is_l2 = self.mean(), self.metric == "l2"
        shift_Q = np.zeros(len(queries_QD), np.float32) if mean_D is None else queries_QD @ mean_D
        least_Q = ((-radius if is_l2 else radius) - shift_Q).astype(np.float32)
        found = self._searcher(parameters, rows).within(queries_QD, least_Q)
        for shift, (scores_R, rows_R) in zip(shift_Q, found, strict=True):
            yield -scores_R if is_l2 else scores_R + shift, rows_R

    def _allowed(self) -> Allowed | None:
        """Return the rows that are not removed; None for all."""
        if self.removed is not None and self.opened.allowed is None:
            mask_N = np.ones(self.num_rows, np.bool_)
            mask_N[self.removed_rows()] = False
            self.opened.allowed = Allowed.of(mask_N)
        return self.opened.allowed

    def _fitting(self, queries_QD: Float32Array) -> Float32Array:
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.dim:
            raise InputError(
                f"{self.folder}: queries of shape {list(queries_QD.shape)} do not fit an index of width"
                f" {self.dim}: it belongs to another model"
            )
        return np.ascontiguousarray(queries_QD, dtype=np.float32)

    def _searcher(self, parameters: str | None, rows: "Sequence[int] | Int64Array | Mask | None") -> Searcher:
        if parameters is None:
            parameters = self.tuned.parameters if self.tuned is not None else ""
        allowed = self._allowed()
        if rows is not None:
            mask_N = mask_of(rows, self.num_rows)
            allowed = Allowed.of(mask_N if allowed is None else mask_N & allowed.mask_N)
        return Searcher(self.folder, self.dim, self.metric, self.parts, self.opened, parameters, allowed)
