"""Tests whether an index finds near rows by its answers, not by its type in FAISS."""

from collections.abc import Callable
from typing import Any

import numpy as np

from eval.index.metric import Metric, pair_scores, scores_of
from pipeline.core.arrays import Float32Array, Int64Array

NUM_QUERIES = 64
_NUM_FOUND = 10
_LEAST_FINDING = 0.9  # of its own rows find any row; a list of a small part may be empty
_LEAST_GAIN = 0.1  # of the best row's advantage over a random one; good factories reach at least 0.3
_MOST_OFF = 0.5  # median error of a cosine against the exact one; coarse codes have about 0.3


def why_out_of_order(
    index: Any,
    queries_QD: Float32Array,
    mean_D: Float32Array,
    rows_of: Callable[[Int64Array], Float32Array],
    metric: Metric = "cosine",
) -> str | None:
    """Return what is wrong with an index's answers to queries that are rows of it, or None.

    Args:
        index: holds rows; for cosine they are unit-norm, or were before their mean was subtracted.
        queries_QD: rows that it holds.
        mean_D: mean of its rows, or of a sample.
        rows_of: returns the vectors of ascending ids.
        metric: by which it ranks.
    """
    scores_QK, rows_QK = index.search(queries_QD, min(_NUM_FOUND, index.ntotal))
    is_found = rows_QK >= 0
    finds_Q = is_found.any(axis=1)
    if finds_Q.mean() < _LEAST_FINDING:
        return "it finds nothing for some of its own rows"
    # A row between two lists may be put into one and, rounded in another batch, searched for in the other.
    queries_QD, scores_QK, rows_QK, is_found = (
        each[finds_Q] for each in (queries_QD, scores_QK, rows_QK, is_found)
    )
    scores_QK = np.where(is_found, scores_of(index, scores_QK, metric), 0)
    if not np.isfinite(scores_QK).all():
        return "its scores are not finite"
    fall_QK = np.where(is_found[:, 1:], scores_QK[:, :-1] - scores_QK[:, 1:], 0)
    if (fall_QK < -1e-5 * np.abs(scores_QK).max()).any():
        return "its scores rise from the first row found to the last: the worst comes first"
    wanted, inverse = np.unique(np.where(is_found, rows_QK, rows_QK.max()), return_inverse=True)
    num_queries, num_found = rows_QK.shape
    query_P = np.repeat(np.arange(num_queries), num_found)
    true_P = pair_scores(queries_QD, query_P, rows_of(wanted), inverse.reshape(-1), metric)
    true_QK, each_Q = true_P.reshape(rows_QK.shape), np.arange(num_queries)
    random_Q = pair_scores(queries_QD, each_Q, mean_D[None], np.zeros_like(each_Q), metric)
    own_Q = pair_scores(queries_QD, each_Q, queries_QD, each_Q, metric)
    to_gain = float((own_Q - random_Q).mean())
    gain = float((true_QK[:, 0] - random_Q).mean())
    if to_gain > 1e-3 and gain < _LEAST_GAIN * to_gain:
        return f"the rows that it puts first are {gain / to_gain:.0%} of the way from random rows to the best"
    off = float(np.median(np.abs(scores_QK - true_QK)[is_found]))
    scale = 1.0 if metric == "cosine" else max(to_gain, float(np.abs(own_Q).mean()))
    if off > _MOST_OFF * scale:
        return f"its scores are {off:.2f} off the exact ones"
    return None
