"""Recall at k with several positives, one rule for ties, and its chance level.

The rank of a query is the place of its best-placed positive when the gallery is ordered by score, highest
first, and equal scores by gallery row (= ascending id, see `eval.datasets.cnclip_tsv`):

    rank = 1 + number of strictly better rows + number of equally good rows that come earlier.

The score of two vectors is their dot product accumulated in float64 in a fixed order (`exact_scores`).
A matrix product rounds one and the same pair differently from place to place and from library to library;
here and in `eval.index.flat` it only finds candidates, and whatever its error bound cannot tell apart is
settled by the exact score. So ranks, prediction files and scores depend only on the vectors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from pipeline.core.arrays import Float32Array, Float64Array, Int64Array

CUTOFFS = (1, 5, 10)
_BLOCK_ELEMENTS = 1 << 22  # scores, or gathered vector elements, held at once


class RecallAtK(TypedDict):
    """Recall at 1, 5 and 10, in percent."""

    r1: float
    r5: float
    r10: float


class RetrievalScores(TypedDict):
    """Both directions in percent; `i2t` is None for sets that are scored text-to-image only (MUGE)."""

    t2i: RecallAtK
    i2t: RecallAtK | None
    mean_recall: float


@dataclass(frozen=True, slots=True)
class Positives:
    """For each query the gallery rows that count as right, as one flat array with bounds."""

    rows: Int64Array  # all positives, query after query
    starts: Int64Array  # [num_queries + 1]; query q owns rows[starts[q]:starts[q + 1]]

    @classmethod
    def of(cls, rows_of_query: Sequence[Int64Array]) -> "Positives":
        """Read the positives of each query.

        Raises:
            ValueError: if a query has none: leave such queries out first.
        """
        counts = np.array([len(rows) for rows in rows_of_query], dtype=np.int64)
        if len(counts) == 0 or counts.min() == 0:
            raise ValueError("every query needs at least one positive, and there must be a query")
        return cls(np.concatenate(rows_of_query), np.concatenate([np.zeros(1, np.int64), counts.cumsum()]))

    @property
    def counts(self) -> Int64Array:
        return np.diff(self.starts)

    @property
    def num_queries(self) -> int:
        return len(self.starts) - 1

    def block(self, start: int, stop: int) -> "Positives":
        first, last = self.starts[start], self.starts[stop]
        return Positives(self.rows[first:last], self.starts[start : stop + 1] - first)

    def best(self, scores: Float64Array) -> tuple[Float64Array, Int64Array]:
        """Return the highest score of each query's positives and the lowest row that has it.

        Scores are as in `rows`.
        """
        best_score = np.maximum.reduceat(scores, self.starts[:-1])
        is_best = scores == np.repeat(best_score, self.counts)
        candidates = np.where(is_best, self.rows, np.iinfo(np.int64).max)
        return best_score, np.minimum.reduceat(candidates, self.starts[:-1])


def exact_scores(left_ND: Float32Array, right_ND: Float32Array) -> Float64Array:
    """Return dot products of pairs of rows in float64: equal vectors have equal scores wherever they
    stand.
    """
    products_ND = left_ND.astype(np.float64) * right_ND
    scores_N: Float64Array = np.ascontiguousarray(products_ND).sum(axis=1)
    return scores_N


def score_error_bound(dim: int) -> float:
    """Return how far a float32 dot product of unit vectors may lie from the exact one.

    It holds for any order of summation.

    gamma_n of Higham, Accuracy and Stability of Numerical Algorithms, section 3.1, twice over: vectors are
    unit-norm to float32 only.
    """
    unit = 2.0**-24
    return 2 * dim * unit / (1 - dim * unit)


def ranks_from_features(query_QD: Float32Array, gallery_ND: Float32Array, positives: Positives) -> Int64Array:
    """Rank (from 1) of each query's best positive, [Q]; unit-norm float32 features."""
    bound = score_error_bound(query_QD.shape[1])
    gallery_DN = np.ascontiguousarray(gallery_ND.T)
    ranks_Q = np.empty(len(query_QD), dtype=np.int64)
    block = max(1, _BLOCK_ELEMENTS // len(gallery_ND))
    for start in range(0, len(query_QD), block):
        stop = min(start + block, len(query_QD))
        part = positives.block(start, stop)
        owner = np.repeat(np.arange(start, stop), part.counts)
        best_score, best_row = part.best(exact_scores_of_pairs(query_QD, owner, gallery_ND, part.rows))
        margin_BN = query_QD[start:stop] @ gallery_DN - best_score[:, None]
        better = np.count_nonzero(margin_BN > bound, axis=1)
        unsure_query, unsure_row = np.nonzero(np.abs(margin_BN) <= bound)
        scores = exact_scores_of_pairs(query_QD, unsure_query + start, gallery_ND, unsure_row)
        ahead = scores > best_score[unsure_query]
        ahead |= (scores == best_score[unsure_query]) & (unsure_row < best_row[unsure_query])
        better += np.bincount(unsure_query[ahead], minlength=stop - start)
        ranks_Q[start:stop] = 1 + better
    return ranks_Q


def ranks_from_scores(scores_QN: npt.NDArray[np.floating], positives: Positives) -> Int64Array:
    """Rank (from 1) of each query's best positive by these scores as they stand, [Q]."""
    owner = np.repeat(np.arange(len(scores_QN)), positives.counts)
    best_score, best_row = positives.best(scores_QN[owner, positives.rows].astype(np.float64))
    ahead_QN = scores_QN > best_score[:, None]
    earlier_QN = np.arange(scores_QN.shape[1]) < best_row[:, None]
    ahead_QN |= (scores_QN == best_score[:, None]) & earlier_QN
    ranks_Q: Int64Array = 1 + np.count_nonzero(ahead_QN, axis=1).astype(np.int64)
    return ranks_Q


def recall_at_k(ranks_Q: Int64Array) -> RecallAtK:
    """Share of queries with a positive among the first 1, 5 and 10, in percent."""
    r1, r5, r10 = (float(100.0 * np.count_nonzero(ranks_Q <= k) / len(ranks_Q)) for k in CUTOFFS)
    return RecallAtK(r1=r1, r5=r5, r10=r10)


def chance_recall_at_k(num_gallery: int, num_positives_Q: Int64Array) -> RecallAtK:
    """Return the expected recall of a random order, in percent.

    It is 1 - C(N - m, k) / C(N, k), averaged over queries.
    """
    counts, weights = np.unique(num_positives_Q, return_counts=True)
    r1, r5, r10 = (
        100.0
        * sum(
            int(weight) * (1 - math.comb(num_gallery - int(count), k) / math.comb(num_gallery, k))
            for count, weight in zip(counts, weights, strict=True)
        )
        / len(num_positives_Q)
        for k in (min(k, num_gallery) for k in CUTOFFS)
    )
    return RecallAtK(r1=r1, r5=r5, r10=r10)


def retrieval_scores(t2i: RecallAtK, i2t: RecallAtK | None) -> RetrievalScores:
    """Return both directions and their mean recall: of six numbers, or of three if `i2t` is None."""
    values = [t2i["r1"], t2i["r5"], t2i["r10"]]
    if i2t is not None:
        values += [i2t["r1"], i2t["r5"], i2t["r10"]]
    return RetrievalScores(t2i=t2i, i2t=i2t, mean_recall=sum(values) / len(values))


def exact_scores_of_pairs(
    query_QD: Float32Array, query_rows: Int64Array, gallery_ND: Float32Array, gallery_rows: Int64Array
) -> Float64Array:
    """Return `exact_scores` of (query row, gallery row) pairs, gathered a bounded number at a time."""
    scores = np.empty(len(query_rows), dtype=np.float64)
    block = max(1, _BLOCK_ELEMENTS // query_QD.shape[1])
    for start in range(0, len(query_rows), block):
        part = slice(start, start + block)
        scores[part] = exact_scores(query_QD[query_rows[part]], gallery_ND[gallery_rows[part]])
    return scores
