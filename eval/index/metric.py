"""How vectors are compared: cosine of unit vectors, inner product, or squared L2 distance."""

from typing import Any, Literal

import numpy as np

from eval.features.layout import check_vectors
from eval.metrics.recall import exact_scores_of_pairs
from pipeline.core.arrays import Float32Array, Float64Array, Int64Array
from pipeline.core.records import InputError

Metric = Literal["cosine", "ip", "l2"]
METRICS: tuple[Metric, ...] = ("cosine", "ip", "l2")
_BLOCK_PAIRS = 1 << 16


def faiss_metric(metric: Metric) -> Any:
    """Return FAISS's number for a metric."""
    import faiss

    return faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT


_OTHER_METRIC = "; give --metric cosine to bring rows to unit length, or --metric ip or l2 to keep theirs"


def prepared(
    rows_ND: Float32Array,
    metric: Metric,
    where: str,
    *,
    normalise: bool,
    numbers_N: Int64Array | None = None,
) -> Float32Array:
    """Return rows as an index of this metric takes them: checked, and of unit length if `normalise`.

    `numbers_N` are the rows' numbers in the file `where`, by default 0, 1, …

    Raises:
        InputError: for rows that are not finite; for cosine for those that have no direction, or are not
            unit-norm although they should be.
    """
    if metric == "cosine" and not normalise:
        check_vectors(rows_ND, where, numbers_N=numbers_N, remedy=_OTHER_METRIC)
        return rows_ND
    numbers_N = np.arange(len(rows_ND)) if numbers_N is None else numbers_N
    squares_N = np.einsum("nd,nd->n", rows_ND, rows_ND, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(squares_N))
    if len(bad):
        raise InputError(
            f"{where}: {len(bad)} of {len(rows_ND)} vectors are NaN or infinite, the first in row"
            f" {numbers_N[bad[0]]}: remove them or write the file again"
        )
    if metric != "cosine":
        return rows_ND
    empty = np.flatnonzero(squares_N == 0)
    if len(empty):
        raise InputError(
            f"{where}: row {numbers_N[empty[0]]} is all zeros, which has no cosine: remove it, or use"
            " --metric l2"
        )
    unit_ND: Float32Array = (rows_ND / np.sqrt(squares_N)[:, None]).astype(np.float32)
    return unit_ND


def pair_scores(
    query_QD: Float32Array, query_P: Int64Array, row_ND: Float32Array, row_P: Int64Array, metric: Metric
) -> Float64Array:
    """Return a score for each pair of a query and a row: more is nearer, so an L2 distance is negative."""
    if metric != "l2":
        return exact_scores_of_pairs(query_QD, query_P, row_ND, row_P)
    score_P = np.empty(len(query_P), dtype=np.float64)
    for start in range(0, len(query_P), _BLOCK_PAIRS):
        part = slice(start, start + _BLOCK_PAIRS)
        apart_BD = query_QD[query_P[part]].astype(np.float64) - row_ND[row_P[part]]
        score_P[part] = -np.einsum("bd,bd->b", apart_BD, apart_BD)
    return score_P


def scores_of(index: Any, found_QK: Float32Array, metric: Metric) -> Float32Array:
    """Return scores for what a FAISS index found: more is nearer, so an L2 distance is negative.

    An index of unit vectors may rank by L2 distance, which is 2 - 2 × cosine: both give the same order.
    """
    if metric == "l2":
        return -found_QK
    if index.metric_type == faiss_metric("ip"):
        return found_QK
    cosine_QK: Float32Array = np.float32(1) - found_QK / np.float32(2)
    return cosine_QK


def distances_of(score_P: Float64Array, metric: Metric) -> Float64Array:
    """Return ann-benchmarks' distances for scores: 1 - cosine, L2, or the negative inner product."""
    if metric == "l2":
        return np.sqrt(-score_P)
    return 1 - score_P if metric == "cosine" else -score_P
