"""Finds the k nearest rows by exact score in little more time than the matrix product takes."""

import numpy as np

from eval.index.device import torch_device
from eval.metrics.recall import exact_scores_of_pairs, score_error_bound
from pipeline.core.arrays import Float32Array, Float64Array, Int64Array

_BLOCK_ELEMENTS = 1 << 23  # scores in memory at once
_GROUP = 64  # columns that their highest score represents


def top_k(query_QD: Float32Array, gallery_ND: Float32Array, k: int) -> tuple[Float64Array, Int64Array]:
    """Return (scores, rows) of the k best gallery rows of each query, both [Q, k].

    Features are unit-norm float32; rows are ordered by decreasing score, ties by lower row. The matrix
    product only finds candidates: the highest score of each group of columns is computed, and the k-th
    highest of these bounds the k-th best score from below, so only groups that reach it, less the product's
    error, need a closer look. `eval.metrics.recall.exact_scores` orders the candidates, so the answer depends
    only on the vectors. If there is a GPU, it computes the products.

    Raises:
        ValueError: if k exceeds the gallery or the widths differ.
    """
    num_rows, dim = gallery_ND.shape
    if not 0 < k <= num_rows or query_QD.shape[1] != dim:
        raise ValueError(
            f"{k} rows of width {query_QD.shape[1]} asked from a gallery of {num_rows} rows of width {dim}"
        )
    device = torch_device()
    if device is not None:
        from eval.index.gpu_search import MAX_BLOCK_ROWS, nearest

        starts = range(0, num_rows, MAX_BLOCK_ROWS)
        return nearest(query_QD, (gallery_ND[row : row + MAX_BLOCK_ROWS] for row in starts), k, device)
    group = max(1, min(_GROUP, num_rows // (4 * k)))
    num_groups = -(-num_rows // group)
    padded_ND = np.zeros((num_groups * group, dim), dtype=np.float32)
    padded_ND[:num_rows] = gallery_ND
    margin = 2 * score_error_bound(dim)
    scores_QK = np.empty((len(query_QD), k), dtype=np.float64)
    rows_QK = np.empty((len(query_QD), k), dtype=np.int64)
    block = max(1, _BLOCK_ELEMENTS // len(padded_ND))
    products = np.empty((min(block, len(query_QD)), len(padded_ND)), dtype=np.float32)
    for start in range(0, len(query_QD), block):
        part = slice(start, min(start + block, len(query_QD)))
        product_BN = np.matmul(query_QD[part], padded_ND.T, out=products[: part.stop - start])
        product_BN[:, num_rows:] = -np.inf
        # group g has columns g, g + num_groups, …, so the maximum reads memory in order
        groups_BWG = product_BN.reshape(len(product_BN), group, num_groups)
        highest_BG = groups_BWG.max(axis=1)
        least_B = np.partition(highest_BG, num_groups - k, axis=1)[:, num_groups - k] - margin
        query, opened = np.nonzero(highest_BG >= least_B[:, None])
        hit, member = np.nonzero(groups_BWG[query, :, opened] >= least_B[query][:, None])
        query, row = query[hit], member * num_groups + opened[hit]
        exact = exact_scores_of_pairs(query_QD[part], query, gallery_ND, row)
        order = np.lexsort((row, -exact, query))
        first = np.searchsorted(query, np.arange(len(product_BN)))  # each query's first candidate
        best = order[first[:, None] + np.arange(k)]
        scores_QK[part], rows_QK[part] = exact[best], row[best]
    return scores_QK, rows_QK
