"""Finds the k nearest rows on a GPU by torch's matrix products, where FAISS is built only for CPUs.

As in `eval.index.exact_search`, a product only finds candidates: the k-th highest score, less the product's
error, bounds them from below. The host orders them by exact scores: the answer depends only on the vectors.
"""

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from eval.metrics.recall import exact_scores_of_pairs, score_error_bound
from pipeline.core.arrays import Float32Array, Float64Array, Int64Array

MAX_BLOCK_ROWS = 262_144  # 512 MiB at width 512
_MAX_SCORES = 1 << 28  # of a product at once: 1 GiB


def nearest(
    query_QD: Float32Array, blocks: Iterable[Float32Array], k: int, device: str
) -> tuple[Float64Array, Int64Array]:
    """Return (scores, rows) of the k rows with the highest inner product for each query, both [Q, k].

    Rows come best first, equal scores by lower row. `blocks` are rows in order, float32, none of them more
    than `MAX_BLOCK_ROWS`. If there are fewer than k rows, row -1 with score -inf fills the rest.
    """
    query_QD = np.ascontiguousarray(query_QD, dtype=np.float32)
    best = _Best(len(query_QD), k)
    on_device_QD = torch.from_numpy(query_QD).to(device)
    bound_Q = 2 * score_error_bound(query_QD.shape[1]) * on_device_QD.norm(dim=1)
    first_row = 0
    with torch.inference_mode(), _full_float32():
        for block_BD in blocks:
            gallery_BD = torch.from_numpy(np.ascontiguousarray(block_BD)).to(device)
            margin_Q = bound_Q * gallery_BD.norm(dim=1).max()
            queries_at_once = max(1, _MAX_SCORES // len(gallery_BD))
            for start in range(0, len(query_QD), queries_at_once):
                part = slice(start, start + queries_at_once)
                score_QB = on_device_QD[part] @ gallery_BD.T
                least_Q = torch.from_numpy(best.least_Q[part]).to(device)
                if k <= len(gallery_BD):
                    least_Q = torch.maximum(least_Q, score_QB.topk(k, dim=1).values[:, -1])
                found = (score_QB >= (least_Q - margin_Q[part])[:, None]).nonzero().cpu().numpy()
                query, row = found[:, 0] + start, found[:, 1]
                score = exact_scores_of_pairs(query_QD, query, block_BD, row)
                best.add(part, query, row + first_row, score)
            first_row += len(block_BD)
    return best.score_QK, best.row_QK


class _Best:
    """The best k rows of each query so far."""

    def __init__(self, num_queries: int, k: int) -> None:
        self.score_QK: Float64Array = np.full((num_queries, k), -np.inf)
        self.row_QK: Int64Array = np.full((num_queries, k), -1, dtype=np.int64)

    @property
    def least_Q(self) -> Float32Array:
        """Return the k-th score of each query, -inf if there are fewer."""
        return np.ascontiguousarray(self.score_QK[:, -1], dtype=np.float32)

    def add(self, part: slice, query: Int64Array, row: Int64Array, score: Float64Array) -> None:
        """Take in (query, row, score) of some of the queries in `part`; rows are higher than those before."""
        num_queries, k = self.score_QK[part].shape
        queries = np.concatenate([np.repeat(np.arange(num_queries), k), query - part.start])
        rows = np.concatenate([self.row_QK[part].ravel(), row])
        scores = np.concatenate([self.score_QK[part].ravel(), score])
        order = np.lexsort((rows, -scores, queries))
        first = np.searchsorted(queries[order], np.arange(num_queries))
        best = order[first[:, None] + np.arange(k)]
        self.score_QK[part], self.row_QK[part] = scores[best], rows[best]


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Have a GPU multiply all 24 bits: TF32 has 11, and an error above the bound."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
