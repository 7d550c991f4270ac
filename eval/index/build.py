"""Builds FAISS indices from factory strings: trains, fills and tests them."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from eval.index.device import Device, build_cagra, from_device, is_cagra, new_cagra, to_device
from eval.index.files import faiss_reason
from eval.index.metric import Metric, faiss_metric
from eval.index.order import NUM_QUERIES, why_out_of_order
from eval.index.structure import check_structure, num_lists, refines_hamming, walk, why_other_metric
from eval.index.views import Centred, Vectors, evenly_spaced
from pipeline.core.arrays import Float32Array
from pipeline.core.records import InputError

DEFAULT_TRAIN_ROWS = 262_144
TRAIN_ROWS_PER_LIST = 39  # FAISS's min_points_per_centroid: with fewer it warns that lists are poor
_TRIAL_ROWS = 1000
_REMEDY = "use another factory, such as HNSW32, IVF1024,SQ8 or IVF1024,PQ64"


def new_index(dim: int, factory: str, metric: Metric = "cosine") -> Any:
    """Return an empty index.

    Raises:
        InputError: if the installed FAISS refuses the string, or builds it for another metric.
    """
    import faiss

    if is_cagra(factory):
        return new_cagra(dim, factory, metric)
    try:
        # FAISS has LSH for distances only, which order unit vectors as their cosine does.
        built_for: Metric = "l2" if re.search(r"\bLSH", factory) else metric
        index = faiss.index_factory(dim, factory, faiss_metric(built_for))
        reason = why_other_metric(index, metric)
    except Exception as error:  # FAISS passes on any error of its libraries, even std::out_of_range
        raise InputError(
            f"FAISS refuses the index {factory!r} at width {dim}: {faiss_reason(error)}; {_REMEDY}"
        ) from None
    if reason is not None:
        raise InputError(f"FAISS's factory {factory!r}: {reason}; {_REMEDY}")
    return index


def rows_to_train(dim: int, factory: str) -> int:
    """Return on how many rows to train: enough for each list.

    Raises:
        InputError: as `new_index` raises it.
    """
    lists = num_lists(new_index(dim, factory)) or 0
    return max(DEFAULT_TRAIN_ROWS, TRAIN_ROWS_PER_LIST * lists)


def train(vectors: Vectors, factory: str, train_rows: int, device: Device) -> Any:
    """Return an empty index, trained on evenly spaced rows and tested on some of them.

    Raises:
        InputError: if FAISS refuses the string or the rows, or the index does not find near rows.
    """
    index = new_index(vectors.dim, factory, vectors.metric)
    if isinstance(vectors, Centred) and refines_hamming(index):
        raise InputError(
            f"{factory}: --centre changes the lengths of rows, and LSH ranks unit vectors only; leave"
            " --centre out (ITQ subtracts the mean itself)"
        )
    wanted = evenly_spaced(train_rows if not index.is_trained else _TRIAL_ROWS, vectors.num_rows)
    count = len(wanted)
    rows_ND = vectors.rows(wanted)
    if not index.is_trained:
        if isinstance(vectors, Centred):
            _let_centroids_be_short(index)
        index = to_device(index, device, factory)
        try:
            index.train(rows_ND)
        except Exception as error:
            raise InputError(
                f"FAISS cannot train {factory!r} on {count} rows: {faiss_reason(error)}"
            ) from None
        index = from_device(index, device)
    few = min(_TRIAL_ROWS, count)
    try_factory(index, factory, rows_ND[np.arange(few) * count // few], vectors.metric)
    return index


def _let_centroids_be_short(index: Any) -> None:
    """Keep k-means from stretching centroids to unit length, as FAISS does for inner products.

    Centred rows are shorter, and codes hold a row's difference to its centroid.
    """
    import faiss

    for part in walk(index):
        if isinstance(part, faiss.IndexIVF):
            part.cp.spherical = False


def try_factory(index: Any, factory: str, rows_ND: Float32Array, metric: Metric = "cosine") -> None:
    """Add rows to a copy of an empty trained index and check that it finds them.

    Raises:
        InputError: if it does not.
    """
    import faiss

    try:
        copy = faiss.deserialize_index(faiss.serialize_index(index))
        copy.add(rows_ND)
        check_structure(copy)
    except Exception as error:
        raise InputError(
            f"FAISS cannot fill the index {factory!r} with {len(rows_ND)} rows: {faiss_reason(error)};"
            f" {_REMEDY}"
        ) from None
    check_answers(copy, factory, rows_ND, metric)


def check_answers(index: Any, factory: str, rows_ND: Float32Array, metric: Metric = "cosine") -> None:
    """Check that an index of these rows ranks near rows first and returns their scores.

    Raises:
        InputError: if it does not.
    """
    places = np.unique(np.linspace(0, len(rows_ND) - 1, NUM_QUERIES).astype(np.int64))
    try:
        reason = why_out_of_order(
            index, rows_ND[places], rows_ND.mean(axis=0), lambda rows: rows_ND[rows], metric
        )
    except Exception as error:
        raise InputError(f"FAISS cannot search the index {factory!r}: {faiss_reason(error)}") from None
    _refuse(factory, reason)


def fill(
    index: Any,
    vectors: Vectors,
    start: int,
    stop: int,
    factory: str,
    device: Device,
    added: Callable[[int], None] = lambda count: None,
) -> Any:
    """Add rows start … stop - 1 to an empty trained index and return the index in its CPU form.

    After each block, `added` is called with the number of these rows in the index.

    Raises:
        InputError: for bad rows, for rows that FAISS refuses, and if the index does not find near rows.
    """
    if is_cagra(factory):
        rows_ND = np.concatenate(list(vectors.blocks(start, stop)))
        index = build_cagra(rows_ND, factory, vectors.metric, device)
        added(len(rows_ND))
    else:
        index = _add(to_device(index, device, factory), vectors, start, stop, factory, added)
        index = from_device(index, device)
    places = np.unique(np.linspace(start, stop - 1, NUM_QUERIES).astype(np.int64))
    queries_QD = vectors.rows(places)
    try:
        reason = why_other_metric(index, vectors.metric) or why_out_of_order(
            index,
            queries_QD,
            queries_QD.mean(axis=0),
            lambda rows: vectors.rows(rows + start),
            vectors.metric,
        )
    except Exception as error:
        raise InputError(f"FAISS cannot search the index {factory!r}: {faiss_reason(error)}") from None
    _refuse(factory, reason)
    return index


def _add(
    index: Any, vectors: Vectors, start: int, stop: int, factory: str, added: Callable[[int], None]
) -> Any:
    count = 0
    for block_BD in vectors.blocks(start, stop):
        try:
            index.add(block_BD)
        except Exception as error:
            raise InputError(f"{factory} on {stop - start} rows: {faiss_reason(error)}") from None
        count += len(block_BD)
        added(count)
    return index


def _refuse(factory: str, reason: str | None) -> None:
    if reason is not None:
        raise InputError(f"FAISS's factory {factory!r} does not search these rows well: {reason}; {_REMEDY}")
