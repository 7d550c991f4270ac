"""Exact nearest neighbours, the files that hold them, and recall against them.

FAISS's `knn_ground_truth`, or torch on a GPU, finds the neighbours from one block of rows at a time. A file
has the layout of big-ann-benchmarks (https://big-ann-benchmarks.com): uint32 queries, uint32 k, int32 rows
[queries, k], float32 scores [queries, k]. ivecs files and the HDF5 files of ann-benchmarks are read as well.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.index.device import Device, torch_device
from eval.index.formats.hdf5 import open_hdf5
from eval.index.metric import distances_of, faiss_metric, pair_scores
from eval.index.views import Vectors
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Float64Array, Int64Array
from pipeline.core.files.foreign import foreign
from pipeline.core.records import InputError

# Rows whose scores differ by less count as equal, as in big-ann-benchmarks; float32 products are off by less.
TIE = 1e-6  # of scores up to 1; a share of larger ones
_ANN_BENCHMARKS_TIE = 1e-3
_BLOCK_ROWS = 32_768  # 64 MiB at width 512, and FAISS's copy
_REMEDY = "compute it again, or leave --ground-truth out"


@dataclass(frozen=True, slots=True)
class Truth:
    """The k nearest rows of each query, nearest first."""

    rows_QK: Int64Array
    scores_QK: Float32Array | None = None  # inner products or squared distances; None: only rows are known

    def of(self, queries: Int64Array) -> "Truth":
        """Return the neighbours of these queries."""
        return Truth(self.rows_QK[queries], None if self.scores_QK is None else self.scores_QK[queries])


@dataclass(frozen=True, slots=True)
class Recall:
    """Shares of the k nearest rows that a search found, 0 to 1, each row counted once."""

    strict: float  # the rows of the ground truth themselves
    with_ties: float  # rows that are as near as the k-th; corpora from the web contain many duplicates
    error: float = 0.0  # standard error of `with_ties`, had other queries been drawn


def exact_neighbours(vectors: Vectors, queries_QD: Float32Array, k: int, device: Device = "cpu") -> Truth:
    """Return the k nearest rows of each query, equal scores by lower row.

    FAISS finds them, on the GPUs unless `device` is "cpu"; for inner products and cosines on "cpu", torch
    does if it has a GPU. Of rows with the k-th score torch gives the lowest, and FAISS any.
    """
    found_by = torch_device() if device == "cpu" and vectors.metric != "l2" else None
    if found_by is not None:
        from eval.index.gpu_search import MAX_BLOCK_ROWS, nearest

        exact_QK, rows_QK = nearest(queries_QD, _equal_blocks(vectors, MAX_BLOCK_ROWS), k, found_by)
        return Truth(rows_QK, exact_QK.astype(np.float32))
    from faiss.contrib.exhaustive_search import knn_ground_truth

    find: Any = knn_ground_truth  # FAISS has no types for it
    queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    scores_QK, rows_QK = find(
        queries_QD,
        _equal_blocks(vectors, _BLOCK_ROWS),
        k,
        faiss_metric(vectors.metric),
        ngpu=0 if device == "cpu" else -1,
    )
    order = np.lexsort((rows_QK, scores_QK if vectors.metric == "l2" else -scores_QK), axis=1)
    return Truth(np.take_along_axis(rows_QK, order, axis=1), np.take_along_axis(scores_QK, order, axis=1))


def without_own(truth: Truth, own_rows_Q: Int64Array) -> Truth:
    """Return one column less: without each query's own row, or without the last one if that is not there."""
    keep_QK = _but_one(truth.rows_QK == own_rows_Q[:, None])
    shape = (len(own_rows_Q), -1)
    scores = None if truth.scores_QK is None else truth.scores_QK[keep_QK].reshape(shape)
    return Truth(truth.rows_QK[keep_QK].reshape(shape), scores)


def recall_of(vectors: Vectors, queries_QD: Float32Array, found_QK: Int64Array, truth: Truth) -> Recall:
    """Return the recall of the rows found, where -1 is not found.

    Raises:
        ValueError: if the ground truth has other queries or fewer neighbours.
    """
    num_queries, k = found_QK.shape
    if len(truth.rows_QK) != num_queries or truth.rows_QK.shape[1] < k:
        raise ValueError(f"a ground truth of {truth.rows_QK.shape} for {num_queries} queries and k = {k}")
    exact_QK = truth.rows_QK[:, :k]
    found_QK = _once(found_QK)
    base = vectors.num_rows + 1
    query_Q1 = np.arange(num_queries)[:, None] * base
    is_exact_QK = np.isin(found_QK + query_Q1, exact_QK + query_Q1) & (found_QK >= 0)
    strict = int(is_exact_QK.sum())
    hits_Q = is_exact_QK.sum(axis=1)
    # Exact scores only of the rows that may tie, and of each query's k-th.
    query, place = np.nonzero(~is_exact_QK & (found_QK >= 0))
    asked, inverse = np.unique(query, return_inverse=True)
    if not len(asked):
        return Recall(strict / found_QK.size, strict / found_QK.size, _standard_error(hits_Q / k))
    rows = np.concatenate([found_QK[query, place], exact_QK[asked, -1]])
    needed, where = np.unique(rows, return_inverse=True)
    scores = pair_scores(
        queries_QD,
        np.concatenate([query, asked]),
        vectors.rows(needed),
        where.reshape(-1),
        vectors.metric,
    )
    kth = scores[len(query) :][inverse.reshape(-1)]
    is_tie = scores[: len(query)] >= kth - TIE * np.maximum(1, np.abs(kth))
    hits_Q = hits_Q + np.bincount(query[is_tie], minlength=num_queries)
    recall = int(hits_Q.sum()) / found_QK.size
    return Recall(strict / found_QK.size, recall, _standard_error(hits_Q / k))


def recall_of_ann_benchmarks(
    vectors: Vectors, queries_QD: Float32Array, found_QK: Int64Array, truth: Truth
) -> float:
    """Return the recall that ann-benchmarks's evaluator computes from these answers.

    It counts the first k answers whose distance is at most that of the k-th neighbour plus 0.001 (its `knn`
    metric, https://github.com/erikbern/ann-benchmarks). A row that is found twice counts twice there.
    """
    query, place = np.nonzero(found_QK >= 0)
    rows = np.concatenate([found_QK[query, place], truth.rows_QK[:, found_QK.shape[1] - 1]])
    needed, where = np.unique(rows, return_inverse=True)
    asked = np.concatenate([query, np.arange(len(found_QK))])
    scores = pair_scores(queries_QD, asked, vectors.rows(needed), where.reshape(-1), vectors.metric)
    away = distances_of(scores, vectors.metric)
    most_Q = away[len(query) :] + _ANN_BENCHMARKS_TIE
    return float((away[: len(query)] <= most_Q[query]).sum() / found_QK.size)


def recall_of_big_ann(found_QK: Int64Array, truth: Truth) -> float:
    """Return the recall that big-ann-benchmarks's evaluator computes from these answers.

    It groups neighbours whose distances differ by less than 1e-6 from the first of their group, and accepts
    the rows of the first k groups (https://github.com/harsha-simhadri/big-ann-benchmarks). With ties among
    the first k these are more than k rows, as many as the ground truth holds.

    Raises:
        ValueError: if the ground truth has no scores.
    """
    if truth.scores_QK is None:
        raise ValueError("a ground truth without scores")
    k, found_QK = found_QK.shape[1], _once(found_QK)
    group_Q = np.zeros(len(found_QK), dtype=np.int64)
    first_Q = truth.scores_QK[:, 0].astype(np.float64)
    accepted_QK = np.zeros(truth.rows_QK.shape, dtype=bool)
    for place in range(truth.rows_QK.shape[1]):
        score_Q = truth.scores_QK[:, place].astype(np.float64)
        is_new_Q = np.abs(score_Q - first_Q) >= TIE
        group_Q += is_new_Q
        first_Q = np.where(is_new_Q, score_Q, first_Q)
        accepted_QK[:, place] = group_Q < k
    base = int(max(found_QK.max(initial=0), truth.rows_QK.max())) + 2
    query_Q1 = np.arange(len(found_QK))[:, None] * base
    accepted = (truth.rows_QK + query_Q1)[accepted_QK]
    return float((np.isin(found_QK + query_Q1, accepted) & (found_QK >= 0)).sum() / found_QK.size)


def _standard_error(share_Q: Float64Array) -> float:
    return float(share_Q.std(ddof=1) / len(share_Q) ** 0.5) if len(share_Q) > 1 else 1.0


def write_truth(path: str, truth: Truth) -> None:
    """Write a file in big-ann-benchmarks's layout.

    Raises:
        ValueError: if the truth has no scores.
    """
    if truth.scores_QK is None:
        raise ValueError("a ground truth without scores")
    head = np.array(truth.rows_QK.shape, dtype="<u4").tobytes()
    body = truth.rows_QK.astype("<i4").tobytes() + truth.scores_QK.astype("<f4").tobytes()
    store.write_bytes(path, head + body)


def read_truth(path: str, *, num_queries: int, num_rows: int, k: int) -> Truth:
    """Read a ground truth: big-ann-benchmarks's layout, .ivecs, or ann-benchmarks's .hdf5.

    A file may hold more queries than wanted: the first ones are taken. Further neighbours are returned, too:
    big-ann-benchmarks's evaluator counts them.

    Raises:
        InputError: for a file of another kind, of fewer queries or neighbours, or with rows that are not in
            the base. It names the file.
    """
    with foreign(path, "ground truth", _REMEDY):
        if path.endswith((".hdf5", ".h5")):
            truth = Truth(_read_hdf5(path))
        elif path.endswith(".ivecs"):
            truth = Truth(_read_ivecs(path))
        else:
            truth = _read_big_ann(path)
    found_queries, found_k = truth.rows_QK.shape
    if found_queries < num_queries or found_k < k:
        raise InputError(
            f"{path}: {found_k} neighbours of {found_queries} queries, but {k} of {num_queries} are needed:"
            f" {_REMEDY}"
        )
    scores = None if truth.scores_QK is None else truth.scores_QK[:num_queries]
    truth = Truth(truth.rows_QK[:num_queries], scores)
    outside = np.argwhere((truth.rows_QK < 0) | (truth.rows_QK >= num_rows))
    if len(outside):
        query, place = outside[0].tolist()
        raise InputError(
            f"{path}: query {query} has row {truth.rows_QK[query, place]} as a neighbour, but there are"
            f" {num_rows} rows: it is of other vectors"
        )
    return truth


def check_truth(path: str, vectors: Vectors, queries_QD: Float32Array, truth: Truth) -> None:
    """Check on some queries that the neighbours come in the order of their scores.

    Raises:
        InputError: if they do not: the file is of other vectors, other queries or another metric.
    """
    some_Q = np.unique(np.linspace(0, len(queries_QD) - 1, 100).astype(np.int64))
    rows_QK = truth.rows_QK[some_Q]
    needed, where = np.unique(rows_QK, return_inverse=True)
    k = rows_QK.shape[1]
    scores = pair_scores(
        queries_QD, np.repeat(some_Q, k), vectors.rows(needed), where.reshape(-1), vectors.metric
    )
    scale = max(1.0, float(np.abs(scores).max()))
    rise_Q = np.diff(scores.reshape(-1, k), axis=1).max(axis=1, initial=-np.inf)
    wrong = np.flatnonzero(rise_Q > 10 * TIE * scale)
    if len(wrong):
        raise InputError(
            f"{path}: the neighbours of query {some_Q[wrong[0]]} are not in the order of their scores: it"
            f" is of other vectors, other queries or another metric; {_REMEDY}"
        )


def _equal_blocks(vectors: Vectors, size: int) -> Iterator[Float32Array]:
    """Yield blocks of one size, also from many small files: FAISS is slow on small ones."""
    for start in range(0, vectors.num_rows, size):
        parts = list(vectors.blocks(start, min(start + size, vectors.num_rows)))
        yield parts[0] if len(parts) == 1 else np.concatenate(parts)


def _once(found_QK: Int64Array) -> Int64Array:
    """Return the rows with -1 for every repetition of a row in its query."""
    ordered_QK = np.sort(found_QK, axis=1)
    ordered_QK[:, 1:][ordered_QK[:, 1:] == ordered_QK[:, :-1]] = -1
    return ordered_QK


def _but_one(is_own_QK: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which columns stay if one goes from each row: the one that is marked, or the last."""
    keep_QK = ~is_own_QK
    keep_QK[keep_QK.all(axis=1), -1] = False
    return keep_QK


def _read_big_ann(path: str) -> Truth:
    data = store.read_bytes(path)
    if len(data) < 8:
        raise InputError(f"{path}: {len(data)} bytes are no ground truth: {_REMEDY}")
    num_queries, k = (int(number) for number in np.frombuffer(data, "<u4", 2))
    size = num_queries * k
    if len(data) not in (8 + 4 * size, 8 + 8 * size) or not size:
        raise InputError(
            f"{path}: its first 8 bytes say {k} neighbours of {num_queries} queries, which do not fit"
            f" {len(data):,} bytes: {_REMEDY}"
        )
    rows_QK = np.frombuffer(data, "<u4", size, offset=8).reshape(num_queries, k).astype(np.int64)
    if len(data) == 8 + 4 * size:
        return Truth(rows_QK)
    return Truth(rows_QK, np.frombuffer(data, "<f4", size, offset=8 + 4 * size).reshape(num_queries, k))


def _read_ivecs(path: str) -> Int64Array:
    numbers = np.frombuffer(store.read_bytes(path), "<i4")
    k = int(numbers[0])
    if k < 1 or len(numbers) % (k + 1) or (numbers[:: k + 1] != k).any():
        raise InputError(f"{path}: not an .ivecs file with rows of one length: {_REMEDY}")
    return numbers.reshape(-1, k + 1)[:, 1:].astype(np.int64)


def _read_hdf5(path: str) -> Int64Array:
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    matrix = open_hdf5(path, "neighbors")
    return matrix.block(0, matrix.shape[0]).astype(np.int64)
