"""Searches the parts of an index, which stay open between searches if memory allows.

All parts are copies of one trained index, so a query's nearest lists are found once for all of them, also if
other codes then refine what the lists give.
"""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.index.files import load_index
from eval.index.metric import Metric, scores_of
from eval.index.parts.part import Part
from eval.index.parts.refine import refined
from eval.index.parts.selection import Allowed, reason_of, search_parameters
from eval.index.structure import limit_search, refines_hamming
from eval.index.tuning.parameters import set_parameters
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.records import ConfigError, InputError

_SHARE_OF_MEMORY = 2  # parts stay open if they take less than half of the available memory
_MOST_FOUND = 1 << 22  # rows of all parts before they are merged
_CENTRED_QUERIES = 64  # of one range search; their radii differ


# Scores [Q, C], more is nearer; rows of a part [Q, C], -1 for none; and the number of the part's first row.
_Found = tuple[Float32Array, Int64Array, int]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A part's FAISS index with the parameters that are set in it."""

    parameters: str
    index: Any
    base: Any  # the index whose answers are refined, or the index itself
    ivf: Any  # the IVF in it, if its lists can be found once for all parts

    @property
    def k_factor(self) -> float:
        """How many times k rows of the base get exact scores."""
        return 1.0 if self.base is self.index else float(self.index.k_factor)


@dataclass(slots=True)
class Opened:
    """What stays in memory of an index: FAISS indices of parts by path, with their parameters."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    parts: dict[str, _Kept] = field(default_factory=dict)
    keeps: bool | None = None  # unknown until the first search
    allowed: Allowed | None = None  # rows that are not removed
    mean_D: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class Searcher:
    """A search of all parts with one setting. Scores are those of inner products: more is nearer."""

    folder: str
    dim: int
    metric: Metric
    parts: tuple[Part, ...]
    opened: Opened
    parameters: str
    allowed: Allowed | None = None

    def nearest(self, queries_QD: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """Return the k best rows of each query: (scores, rows); -inf and -1 for none."""
        found, num_columns = list[_Found](), 0
        lists: tuple[int, Any, Any] | None = None
        with self.opened.lock:
            for part, path, kept, limits in self._parts():
                ivf, num_found = kept.ivf if limits is None else None, min(k, part.num_rows)
                try:
                    if ivf is None:
                        scores_QK, rows_QK = kept.index.search(queries_QD, num_found, params=limits)
                    else:
                        if lists is None or lists[0] != ivf.nlist:
                            moved_QD = _through_steps(kept.base, queries_QD)
                            lists = (ivf.nlist, moved_QD, ivf.quantizer.search(moved_QD, ivf.nprobe))
                        num_first = min(int(num_found * kept.k_factor), part.num_rows)
                        scores_QK, rows_QK = _search_lists(ivf, lists[1], lists[2], num_first)
                        if kept.base is not kept.index:
                            scores_QK, rows_QK = refined(
                                kept.index.refine_index, queries_QD, rows_QK, num_found
                            )
                except Exception as error:
                    raise reason_of(path, error) from None
                found.append((scores_of(kept.index, scores_QK, self.metric), rows_QK, part.first_row))
                num_columns += num_found
                if num_columns * len(queries_QD) > _MOST_FOUND:
                    found, num_columns = [(*_merge(found, len(queries_QD), k), 0)], k
        return _merge(found, len(queries_QD), k)

    def within(
        self, queries_QD: Float32Array, radius_Q: Float32Array
    ) -> Iterator[tuple[Float32Array, Int64Array]]:
        """Yield (scores, rows) of each query with scores of at least the query's radius, best first."""
        step = len(queries_QD) if (radius_Q == radius_Q[0]).all() else _CENTRED_QUERIES
        for start in range(0, len(queries_QD), step):
            part_QD, least_Q = queries_QD[start : start + step], radius_Q[start : start + step]
            yield from self._within(part_QD, least_Q)

    def _within(
        self, queries_QD: Float32Array, least_Q: Float32Array
    ) -> Iterator[tuple[Float32Array, Int64Array]]:
        owner, scores, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
        is_l2, least = self.metric == "l2", float(least_Q.min())
        # FAISS leaves out what is exactly at the radius
        radius = float(
            np.nextafter(np.float32(-least if is_l2 else least), np.float32(np.inf if is_l2 else -np.inf))
        )
        with self.opened.lock:
            for part, path, kept, limits in self._parts():
                if refines_hamming(kept.index):
                    raise InputError(
                        f"{path}: differing bits of LSH have no radius in scores; search for the k nearest"
                    )
                try:
                    ends_Q, scores_R, rows_R = kept.index.range_search(queries_QD, radius, params=limits)
                except Exception as error:
                    raise reason_of(path, error) from None
                owner.append(np.repeat(np.arange(len(queries_QD)), np.diff(ends_Q.astype(np.int64))))
                scores.append(-scores_R if is_l2 else scores_R)
                rows.append(rows_R.astype(np.int64) + part.first_row)
        all_owner, all_scores, all_rows = (np.concatenate(each) for each in (owner, scores, rows))
        kept = all_scores >= least_Q[all_owner]
        all_owner, all_scores, all_rows = all_owner[kept], all_scores[kept], all_rows[kept]
        order = np.lexsort((all_rows, -all_scores, all_owner))
        ends_Q = np.searchsorted(all_owner[order], np.arange(len(queries_QD) + 1))
        for first, end in itertools.pairwise(ends_Q.tolist()):
            yield all_scores[order[first:end]], all_rows[order[first:end]]

    def _parts(self) -> Iterator[tuple[Part, str, "_Kept", Any]]:
        """Yield each part that may answer, its path, its index, and FAISS's parameters if it is filtered."""
        share = 1.0 if self.allowed is None else self.allowed.share
        for part in self.parts:
            selector = None
            if self.allowed is not None:
                selector = self.allowed.part(part.first_row, part.num_rows)
                if selector is None:
                    continue
            path = store.join(self.folder, part.path)
            kept = self._open(part, path)
            limits = None if selector is None else search_parameters(kept.index, selector, share)
            yield part, path, kept, limits

    def _open(self, part: Part, path: str) -> "_Kept":
        import faiss

        opened = self.opened
        kept = opened.parts.get(path)
        if kept is not None and kept.parameters == self.parameters:
            return kept
        opened.parts.pop(path, None)  # other parameters: those that are not named go back to their defaults
        index = load_index(path, metric=self.metric)
        if (index.d, index.ntotal) != (self.dim, part.num_rows):
            raise InputError(
                f"{path}: {index.ntotal} rows of width {index.d}, but index.json has {part.num_rows} of"
                f" {self.dim}; build it again: cnclip index --redo"
            )
        try:
            set_parameters(index, self.parameters)
        except ConfigError as error:
            raise ConfigError(
                f"{self.folder}: {error}; correct them, or tune the index again if its index.json has them"
            ) from None
        limit_search(index)
        if opened.keeps is None:
            size = sum(part.num_bytes for part in self.parts)
            opened.keeps = _SHARE_OF_MEMORY * size <= _available_bytes()
        base = faiss.downcast_index(index.base_index) if isinstance(index, faiss.IndexRefine) else index
        kept = _Kept(self.parameters, index, base, _plain_lists(base))
        if opened.keeps:
            opened.parts[path] = kept
        return kept


def _search_lists(
    ivf: Any, moved_QD: Float32Array, nearest: tuple[Float32Array, Int64Array], k: int
) -> tuple[Float32Array, Int64Array]:
    """Return what one part has in the nearest lists: (scores, rows of the part).

    FAISS's Python method for this checks and converts its arguments, which takes longer than the search of a
    part for one query; here they are as its C++ wants them.
    """
    import faiss

    near_QP, list_QP = nearest
    scores_QK = np.empty((len(moved_QD), k), dtype=np.float32)
    rows_QK = np.empty((len(moved_QD), k), dtype=np.int64)
    arrays = (moved_QD, list_QP, near_QP, scores_QK, rows_QK)
    moved, lists, near, scores, rows = (faiss.swig_ptr(array) for array in arrays)
    ivf.search_preassigned_c(len(moved_QD), moved, k, lists, near, scores, rows, False)
    return scores_QK, rows_QK


def _plain_lists(index: Any) -> Any:
    """Return the IVF of an index that is one, or one after transforms; None for other kinds."""
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index if isinstance(index, faiss.IndexIVF) else None


def _through_steps(index: Any, queries_QD: Float32Array) -> Float32Array:
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # FAISS's stubs have a list
        for step in range(chain.size()):
            queries_QD = faiss.downcast_VectorTransform(chain.at(step)).apply(queries_QD)
    return queries_QD


def _merge(found: list[_Found], num_queries: int, k: int) -> tuple[Float32Array, Int64Array]:
    """Return the k best of all columns, ties by lower row; -inf and -1 if there are fewer."""
    none_QK = np.full((num_queries, k), -1, dtype=np.int64)
    found = [*found, (np.full((num_queries, k), -np.inf, dtype=np.float32), none_QK, 0)]
    scores_QC, rows_QC = (np.concatenate([each[axis] for each in found], axis=1) for axis in (0, 1))
    first_C = np.repeat([first for _, _, first in found], [rows.shape[1] for _, rows, _ in found])
    is_found_QC = rows_QC >= 0
    scores_QC = np.where(is_found_QC, scores_QC, -np.inf).astype(np.float32, copy=False)
    sorting_QC = np.where(is_found_QC, rows_QC + first_C, np.iinfo(np.int64).max)
    order_QK = np.lexsort((sorting_QC, -scores_QC), axis=1)[:, :k]
    rows_QC = np.where(is_found_QC, sorting_QC, -1)
    return np.take_along_axis(scores_QC, order_QK, axis=1), np.take_along_axis(rows_QC, order_QK, axis=1)


def _available_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
