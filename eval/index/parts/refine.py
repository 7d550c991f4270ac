"""Orders what an index's first codes found by the scores of its second ones, as FAISS's IndexRefine does."""

from typing import Any

import numpy as np

from pipeline.core.arrays import Float32Array, Int64Array

_DECODED_BYTES = 64 << 20  # rows that are decoded at once


def refined(
    codes: Any, queries_QD: Float32Array, rows_QC: Int64Array, k: int
) -> tuple[Float32Array, Int64Array]:
    """Return the k best of each query's candidates by `codes`: (scores [Q, k], rows [Q, k]).

    Args:
        codes: the FAISS index `refine_index`, whose metric gives the scores.
        queries_QD: before any transform.
        rows_QC: candidates, -1 for none; at least k.
        k: rows to return.
    """
    import faiss

    codes = faiss.downcast_index(codes)
    is_l2 = codes.metric_type == faiss.METRIC_L2
    scores_QC = np.empty(rows_QC.shape, dtype=np.float32)
    if isinstance(codes, faiss.IndexFlat):
        arrays = (queries_QD, scores_QC, rows_QC)
        queries, scores, rows = (faiss.swig_ptr(array) for array in arrays)
        compare: Any = codes.compute_distance_subset  # type: ignore[attr-defined]
        compare(len(queries_QD), queries, rows_QC.shape[1], scores, rows)
    else:
        step = max(1, _DECODED_BYTES // (4 * codes.d * rows_QC.shape[1]))
        for start in range(0, len(queries_QD), step):
            part_QC = rows_QC[start : start + step]
            decoded_QCD = codes.reconstruct_batch(np.maximum(part_QC, 0).reshape(-1))
            decoded_QCD = decoded_QCD.reshape(*part_QC.shape, codes.d)
            asked_QD = queries_QD[start : start + step]
            if is_l2:
                apart_QCD = decoded_QCD - asked_QD[:, None]
                scores_QC[start : start + step] = np.einsum("qcd,qcd->qc", apart_QCD, apart_QCD)
            else:
                scores_QC[start : start + step] = (decoded_QCD @ asked_QD[:, :, None])[..., 0]
    worst = np.inf if is_l2 else -np.inf
    scores_QC = np.where(rows_QC >= 0, scores_QC, np.float32(worst))
    order_QK = np.argsort(scores_QC if is_l2 else -scores_QC, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_QC, order_QK, axis=1), np.take_along_axis(rows_QC, order_QK, axis=1)
