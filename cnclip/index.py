"""`cnclip.Index`: a FAISS index over features, which may be larger than memory."""

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array

if TYPE_CHECKING:
    from eval.index.parts.selection import Mask

VECTORS = "vectors.npy"


class Index:
    """An index in a folder that `cnclip index` or `Index.build` wrote.

    Rows are numbered in the order of the features. Searches use the parameters that the index was tuned to.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep_open: bool = True) -> None:
        """Open an index and verify its files.

        Its parts stay open between searches if they take less than half of the available memory. Without
        `keep_open`, one part is in memory at a time, and a search takes longer.

        Raises:
            InputError: if the folder holds no complete index, or a damaged one.
        """
        from eval.index.partitioned import PartedIndex

        self._keep_open = keep_open
        self._index = PartedIndex.open(os.fspath(folder), keep_open=keep_open)

    @classmethod
    def build(
        cls,
        vectors: "Float32Array | str",
        folder: str | os.PathLike[str],
        *,
        factory: str | None = None,
        memory_gib: float = 4.0,
        recall: float = 0.95,
        centre: bool = False,
        queries: "Float32Array | None" = None,
        k: int = 10,
        rows_per_part: int = 500_000,
        redo: bool = False,
        metric: Literal["cosine", "ip", "l2"] | None = None,
    ) -> "Index":
        """Build an index of vectors and tune it, or continue an interrupted build.

        Args:
            vectors: an array [N, D], which is saved in the folder as vectors.npy; or what `cnclip index`
                takes: a file (.npy, .fbin, .fvecs, .hdf5, .parquet:COLUMN …), a folder of .npy files, or
                clip-retrieval's folder.
            folder: the folder for the index.
            factory: FAISS's factory string (default: one that suits the size, `memory_gib` and `recall`).
            memory_gib: memory for the whole index, in GiB.
            recall: target recall against exact search, 0 to 1. Python warns if the index cannot reach it.
            centre: whether to subtract the vectors' mean before coding them.
            queries: vectors [Q, D] to tune with (default: text features in the same folder, or rows
                of `vectors`).
            k: neighbours of each query for which the recall is meant.
            rows_per_part: rows of one FAISS file.
            redo: whether to replace an index of other vectors or settings.
            metric: "cosine" of rows brought to unit length, "ip" for inner products, "l2" for distances
                (default: cosine of rows that have unit length, or what an HDF5 file names).

        Raises:
            InputError, ConfigError: for vectors that do not suit the metric, a factory that FAISS refuses,
                or a folder that holds another index.
        """
        from eval.index.build import rows_to_train
        from eval.index.embeddings import Embeddings
        from eval.index.partitioned import build_parts
        from eval.index.tuning.queries import choose_queries, queries_of_array
        from eval.index.tuning.suggest import suggest
        from eval.index.tuning.tune import NUM_QUERIES, Tuning

        place = os.fspath(folder)
        source = vectors if isinstance(vectors, str) else _keep(vectors, place)
        embeddings = Embeddings.open(source, metric=metric)
        chosen = factory or suggest(embeddings.num_rows, embeddings.dim, memory_gib * 2**30, recall)
        asking = (
            choose_queries(source, embeddings, "image", NUM_QUERIES, None)
            if queries is None
            else queries_of_array(np.asarray(queries, dtype=np.float32), embeddings)
        )
        built = build_parts(
            embeddings,
            place,
            factory=chosen,
            rows_per_part=rows_per_part,
            train_rows=rows_to_train(embeddings.dim, chosen),
            redo=redo,
            centre=centre,
            tuning=Tuning(asking, recall, k),
        )
        if built.tuned is not None and not built.tuned.reached:
            warnings.warn(
                f"{place}: {chosen} reaches at most {built.tuned}; give more memory_gib or another factory",
                stacklevel=2,
            )
        return cls(place)

    def append(self, vectors: "Float32Array | str | os.PathLike[str]") -> int:
        """Add rows behind those of the index, without training or tuning again; return how many.

        Args:
            vectors: an array [N, D]; or the path of the features that were indexed, with further files.

        Raises:
            InputError, ConfigError: for vectors that do not fit the index, and for features that do not begin
                with what was indexed.
        """
        import tempfile

        from eval.index.embeddings import Embeddings
        from eval.index.parts.change import append_grown, append_rows

        folder, before = self._index.folder, len(self)
        metric = None if self._index.metric == "cosine" else self._index.metric
        if isinstance(vectors, np.ndarray):
            with tempfile.TemporaryDirectory() as place:
                append_rows(Embeddings.open(_keep(vectors, place), metric=metric), folder)
        else:
            append_grown(Embeddings.open(os.fspath(vectors), metric=metric), folder)
        self._reopen()
        return len(self) - before

    def remove(self, rows: "Sequence[int] | Int64Array | Mask") -> None:
        """Leave rows out of all answers from now on; the others keep their numbers.

        Args:
            rows: their numbers, or a mask [rows].

        Raises:
            InputError: for rows that the index does not have, and if none would be left.
        """
        self._change_rows(rows, restore=False)

    def restore(self, rows: "Sequence[int] | Int64Array | Mask") -> None:
        """Let removed rows answer again; `rows` are those of `remove`."""
        self._change_rows(rows, restore=True)

    def where(self, expression: str, features: str | os.PathLike[str]) -> "Mask":
        """Return a mask of the rows whose metadata fulfil an SQL expression, for `search` and `remove`.

        Args:
            expression: over the columns, such as "source = 'laion' AND width > 300".
            features: the folder that was indexed; its metadata/ has the columns.

        Raises:
            InputError, ConfigError: for missing metadata, and for an expression that is no condition.
        """
        from eval.index.parts.selection import rows_where

        return rows_where(os.fspath(features), expression, len(self))

    def _change_rows(self, rows: "Sequence[int] | Int64Array | Mask", *, restore: bool) -> None:
        from eval.index.parts.change import remove_rows
        from eval.index.parts.selection import mask_of

        numbers = np.flatnonzero(mask_of(rows, len(self)))
        remove_rows(self._index.folder, numbers, restore=restore)
        self._reopen()

    def _reopen(self) -> None:
        from eval.index.partitioned import PartedIndex

        self._index = PartedIndex.open(self._index.folder, keep_open=self._keep_open)

    def __len__(self) -> int:
        return self._index.num_rows

    def __repr__(self) -> str:
        rows = f"{len(self):,} rows of width {self.dim}"
        return f"cnclip.Index({self._index.folder!r}, {self.factory}, {rows})"

    @property
    def dim(self) -> int:
        """Return the width D of the vectors."""
        return self._index.dim

    @property
    def num_removed(self) -> int:
        """Return how many rows do not answer."""
        return len(self._index.removed_rows())

    @property
    def factory(self) -> str:
        """Return FAISS's factory string."""
        return self._index.factory

    @property
    def parameters(self) -> str:
        """Return FAISS's string of the parameters that searches use; empty for its defaults."""
        return "" if self._index.tuned is None else self._index.tuned.parameters

    @property
    def recall(self) -> float | None:
        """Return the recall that was measured with these parameters, 0 to 1; None if none was."""
        return None if self._index.tuned is None else self._index.tuned.recall

    def search(
        self,
        vectors: Float32Array,
        k: int = 10,
        *,
        parameters: str | None = None,
        rows: "Sequence[int] | Int64Array | Mask | None" = None,
    ) -> tuple[Float32Array, Int64Array]:
        """Return the k best rows of each query, (score_QK, row_QK), best first, equal scores by lower row.

        Scores are inner products, or squared distances for the metric "l2". Queries are taken as they are:
        for cosines they have unit length.

        Args:
            vectors: queries [Q, D], or one query [D], which returns k scores and rows.
            k: neighbours of each query.
            parameters: FAISS's string, such as "nprobe=16" (default: those of `parameters`).
            rows: only these may answer: their numbers, or a mask [rows] such as `where` returns.

        Rows that were not found are -1 with a score of -inf, or a distance of inf.

        Raises:
            InputError: for queries of another width, for k above the number of rows, and with `rows` for a
                kind of index that FAISS cannot filter.
        """
        query = np.asarray(vectors, dtype=np.float32)
        score_QK, row_QK = self._index.search(np.atleast_2d(query), k, parameters=parameters, rows=rows)
        return (score_QK[0], row_QK[0]) if query.ndim == 1 else (score_QK, row_QK)

    def search_range(
        self,
        vectors: Float32Array,
        radius: float,
        *,
        parameters: str | None = None,
        rows: "Sequence[int] | Int64Array | Mask | None" = None,
    ) -> "Iterator[tuple[Float32Array, Int64Array]]":
        """Yield (scores, rows) of each query: all rows found with a score of at least `radius`, best first.

        For the metric "l2" these are rows at a squared distance of at most `radius`. Other arguments are
        those of `search`.

        Raises:
            InputError: for queries of another width, and for a kind of index without range search.
        """
        query = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
        return self._index.search_range(query, radius, parameters=parameters, rows=rows)


def _keep(vectors: Float32Array, folder: str) -> str:
    path = store.join(folder, VECTORS)
    with store.publish(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.ascontiguousarray(vectors, dtype=np.float32), allow_pickle=False)
    return path
