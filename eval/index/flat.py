"""Builds FAISS inner-product indices by factory string in one file, and searches them in batches."""

from typing import Any

import numpy as np

from eval.features.layout import read_vectors
from eval.index.build import check_answers, new_index
from eval.index.embeddings import Embeddings
from eval.index.exact_search import top_k
from eval.index.files import faiss_reason, load_index, write_index
from eval.index.metric import scores_of
from eval.index.structure import is_exact
from eval.index.tuning.parameters import Tuned, set_parameters
from eval.index.tuning.queries import own_rows, queries_of_file
from eval.index.tuning.tune import NUM_QUERIES, Tuning, tune_index
from pipeline.core.arrays import Float32Array, Float64Array, Int64Array
from pipeline.core.records import InputError

TARGET = 0.99  # on rows of the index; texts lie outside their distribution and find less
_K = 10
_QUERIES_PER_BATCH = 256


def build_index(
    vectors_path: str, index_path: str, *, factory: str = "Flat", queries_path: str | None = None
) -> Tuned | None:
    """Index the vectors of a `.npy` file by inner product; row i of the file is id i of the index.

    `factory` is a FAISS factory string (https://github.com/facebookresearch/faiss/wiki/The-index-factory);
    "Flat" is exact. With the features of `queries_path` the index gets the search parameters that reach a
    recall of `TARGET` for its own rows, which its file keeps, and this function returns what these queries
    reach with them; None if the index is exact or too small to tune. The queries choose nothing, since they
    measure the model afterwards. The same vectors give the same bytes.

    Raises:
        InputError: for bad vectors or a string that FAISS refuses.
    """
    vectors_ND = read_vectors(vectors_path)
    index = new_index(vectors_ND.shape[1], factory)
    try:
        if not index.is_trained:
            index.train(vectors_ND)
        index.add(vectors_ND)
    except Exception as error:  # FAISS passes on any error of its libraries
        raise InputError(
            f"{vectors_path}: FAISS cannot build the index {factory!r}: {faiss_reason(error)}"
        ) from None
    check_answers(index, factory, vectors_ND)
    tuned = None if queries_path is None else _tune(index, vectors_path, queries_path)
    write_index(index, index_path)
    return tuned


def _tune(index: Any, vectors_path: str, queries_path: str) -> Tuned | None:
    """Find and set the search parameters of a filled index."""
    vectors = Embeddings.open(vectors_path)
    asking = queries_of_file(queries_path, vectors, vectors_path, NUM_QUERIES)
    if is_exact(index) or vectors.num_rows <= _K:  # each row finds itself besides the k
        return None

    def found(queries_QD: Float32Array, k: int, parameters: str) -> Int64Array:
        set_parameters(index, parameters)
        rows_QK: Int64Array = index.search(queries_QD, k)[1]
        return rows_QK

    tuning = Tuning(own_rows(vectors, NUM_QUERIES), TARGET, _K)
    tuned = tune_index(index, found, vectors, tuning, is_for_file=True, measuring=asking)
    set_parameters(index, tuned.parameters)
    return tuned


def read_index(path: str) -> Any:
    """Read the FAISS index of a file.

    Raises:
        InputError: if the file is missing or damaged.
    """
    return load_index(path, mapped=False)


def search(index: Any, queries_QD: Float32Array, k: int) -> tuple[Float64Array, Int64Array]:
    """Return the k best rows of each query: (scores, rows), both [Q, k].

    Rows come best first, equal scores by lower row.

    The order of equal scores and the rounding of float32 sums depend on FAISS's heap and kernels. So for a
    flat index this function searches the vectors with `eval.index.exact_search.top_k`, and the answer depends
    only on the vectors. For any other index it orders FAISS's results by FAISS's scores; rows not found are
    -1 and come last.

    Raises:
        ValueError: if the index holds fewer than k rows or vectors of another width.
    """
    import faiss

    if index.ntotal < k or index.d != queries_QD.shape[1]:
        raise ValueError(
            f"{k} rows of width {queries_QD.shape[1]} asked from an index of {index.ntotal} rows of width"
            f" {index.d}"
        )
    is_flat = isinstance(faiss.downcast_index(index), faiss.IndexFlat)
    if is_flat:
        return top_k(queries_QD, index.reconstruct_n(0, index.ntotal), k)
    scores_QK = np.empty((len(queries_QD), k), dtype=np.float64)
    rows_QK = np.empty((len(queries_QD), k), dtype=np.int64)
    for start in range(0, len(queries_QD), _QUERIES_PER_BATCH):
        part = slice(start, start + _QUERIES_PER_BATCH)
        coarse_BK, found_BK = index.search(np.ascontiguousarray(queries_QD[part]), k)
        coarse_BK = scores_of(index, coarse_BK, "cosine").astype(np.float64)
        scores_QK[part], rows_QK[part] = _best_first(coarse_BK, found_BK, k)
    return scores_QK, rows_QK


def _best_first(scores_BC: Float64Array, rows_BC: Int64Array, k: int) -> tuple[Float64Array, Int64Array]:
    """Return the first k by (score descending, row ascending); rows of -1 (not found) come last."""
    missing = rows_BC < 0
    order = np.lexsort((rows_BC, np.where(missing, np.inf, -scores_BC)), axis=1)[:, :k]
    return np.take_along_axis(scores_BC, order, axis=1), np.take_along_axis(rows_BC, order, axis=1)
