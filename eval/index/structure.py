"""Checks the structure of a FAISS index: that all of it ranks by one metric, and that its parts agree.

FAISS checks much while it reads a file, but not that the parts fit each other, and a search over inconsistent
parts reads beyond their memory. Its factory builds some kinds for the L2 distance although the inner product
is requested, and then the worst row comes first.
"""

from collections.abc import Iterator
from typing import Any

from eval.index.metric import Metric, faiss_metric

# Attributes with the indices inside an index.
_INSIDE = ("index", "base_index", "refine_index", "quantizer", "storage", "index_ivf")
_QUANTIZERS = ("pq", "sq", "rq", "lsq", "prq", "plsq", "rabitq")  # fields of kinds that code rows
_MOST_DEEP = 16
_MOST_STRETCH = 1e-3  # of a rotation in float32; learnt ones are off by 1e-4 at most
_MOST_REFINED = 1024.0  # times k rows get exact scores
_MOST_INT = 2**31 - 1
_MOST_ENTRIES = 1 << 16  # random rows at which a search of a CAGRA graph starts; FAISS's default is 32 or 256
_BLOCK_ROWS = 32  # per block of the fast scan kinds; the factory makes no other size


def walk(index: Any, depth: int = 0) -> Iterator[Any]:
    """Yield an index and all indices inside it, each downcast to its class.

    Raises:
        ValueError: for endless nesting.
    """
    import faiss

    if depth > _MOST_DEEP:
        raise ValueError(f"indices inside indices, more than {_MOST_DEEP} deep")
    index = faiss.downcast_index(index)
    yield index
    for name in _INSIDE:
        inner = getattr(index, name, None)
        if isinstance(inner, faiss.Index):
            yield from walk(inner, depth + 1)


def num_lists(index: Any) -> int | None:
    """Return the number of inverted lists, or None for an index without them."""
    import faiss

    for part in walk(index):
        if isinstance(part, faiss.IndexIVF):
            return int(part.nlist)
    return None


def is_exact(index: Any) -> bool:
    """Return whether every search compares the query with all rows as they are."""
    import faiss

    return isinstance(faiss.downcast_index(index), faiss.IndexFlat)


def has_nsg(index: Any) -> bool:
    """Return whether an NSG graph finds rows."""
    import faiss

    return any(isinstance(part, faiss.IndexNSG) for part in walk(index))


def set_search_l(index: Any, candidates: int) -> None:
    """Set the candidates of NSG's search.

    Raises:
        ValueError: if there are none.
    """
    import faiss

    if candidates < 1:
        raise ValueError(f"search_L={candidates}: at least 1")
    for part in walk(index):
        if isinstance(part, faiss.IndexNSG):
            part.nsg.search_L = min(candidates, _MOST_INT)


def refines_hamming(index: Any) -> bool:
    """Return whether an index finds rows by the Hamming distance of LSH's codes, and then refines them."""
    import faiss

    index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexRefine):
        return False
    base = faiss.downcast_index(index.base_index)
    while isinstance(base, faiss.IndexPreTransform):
        base = faiss.downcast_index(base.index)
    return isinstance(base, faiss.IndexLSH)


def quantised_bits(index: Any) -> int | None:
    """Return the bits of a query's numbers in a search of RaBitQ codes (0: not rounded), or None.

    None if there are no such codes; the fast scan kinds take no other number.
    """
    import faiss

    for part in walk(index):
        if isinstance(part, faiss.IndexRaBitQ | faiss.IndexIVFRaBitQ):
            return int(part.qb)
    return None


def set_quantised_bits(index: Any, bits: int) -> None:
    """Set the bits of a query's numbers in a search of RaBitQ codes.

    Raises:
        ValueError: for less than 0 or more than 8.
    """
    import faiss

    if not 0 <= bits <= 8:
        raise ValueError(f"qb={bits}: 0 to 8")
    for part in walk(index):
        if isinstance(part, faiss.IndexRaBitQ | faiss.IndexIVFRaBitQ):
            part.qb = bits


def why_other_metric(index: Any, metric: Metric = "cosine") -> str | None:
    """Return why an index's scores are not the metric's of the original vectors, or None if they are."""
    import faiss

    if refines_hamming(index):
        # Bits only choose the rows, so what stands before them may move or stretch vectors.
        if metric == "ip":
            return "LSH's bits tell angles, not inner products; use --metric cosine, or RaBitQ,RFlat"
        refine: Any = faiss.downcast_index(index)
        return why_other_metric(refine.refine_index, "l2")
    for part in walk(index):
        name = type(part).__name__
        if isinstance(part, faiss.IndexLSH):
            return (
                "LSH counts bits that differ, which are no scores; let exact scores order what it finds:"
                " LSH,RFlat or ITQ,LSH,RFlat"
            )
        if isinstance(part, faiss.IndexIDMap | faiss.IndexIDMap2):
            return f"{name} keeps separate ids, but rows are found by position; leave IDMap out"
        if part.metric_type != faiss_metric(metric):
            return f"{name} ranks by {_measure(part.metric_type)}, not by {_measure(faiss_metric(metric))}"
        for step in _transforms(part):
            if isinstance(step, faiss.PCAMatrix) and step.eigen_power != 0:
                return "PCAW whitens, so scores are not the vectors' inner products; use OPQ or RR"
            # The mean is subtracted from the vectors, so rows near the mean sink in the ranking, but not by
            # their distance.
            if (
                isinstance(step, faiss.ITQTransform)
                or (metric != "l2" and isinstance(step, faiss.CenteringTransform))
                or (
                    metric != "l2"
                    and isinstance(step, faiss.LinearTransform)
                    and step.have_bias
                    and (not step.is_trained or faiss.vector_to_array(step.b).any())
                )
            ):
                return (
                    f"{type(step).__name__} subtracts the rows' mean, which changes scores; use OPQ or RR, or"
                    " codes that only choose rows for exact scores: ITQ,LSH,RFlat"
                )
            if step.is_trained and not _keeps_products(step):
                return (
                    f"{type(step).__name__} stretches rows or drops some of their dimensions, which changes"
                    " scores; use OPQ or RR"
                )
    return None


def _keeps_products(step: Any) -> bool:
    """Return whether a step only rotates or projects vectors."""
    import faiss
    import numpy as np

    if isinstance(step, faiss.RemapDimensionsTransform):
        places = faiss.vector_to_array(step.map)
        return np.array_equal(np.sort(places[places >= 0]), np.arange(step.d_in))
    if not isinstance(step, faiss.LinearTransform):
        return True
    matrix = faiss.vector_to_array(step.A)
    if len(matrix) != step.d_in * step.d_out:
        raise ValueError(f"{type(step).__name__}: a matrix of {len(matrix)} numbers")
    matrix = matrix.reshape(step.d_out, step.d_in).astype(np.float64)
    gram = matrix @ matrix.T if step.d_out <= step.d_in else matrix.T @ matrix
    return bool((np.abs(gram - np.eye(len(gram))) <= _MOST_STRETCH).all())


def limit_search(index: Any) -> None:
    """Limit search parameters to the size of the index, because some kinds fail or reserve memory for more.

    FAISS stores these numbers in the file and `index.json` names them, so they are untrusted: call this after
    reading either. An empty graph keeps its numbers, since rows may be added.
    """
    import faiss

    for part in walk(index):
        if isinstance(part, faiss.IndexIVF):
            part.nprobe = max(1, min(part.nprobe, part.nlist))
        elif isinstance(part, faiss.IndexRefine):
            part.k_factor = max(1.0, min(part.k_factor, _MOST_REFINED))
        elif not part.ntotal:
            continue
        elif isinstance(part, faiss.IndexHNSW):
            part.hnsw.efSearch = max(1, min(part.hnsw.efSearch, part.ntotal))
        elif isinstance(part, faiss.IndexNSG):
            part.nsg.search_L = max(1, min(part.nsg.search_L, part.ntotal))


def check_structure(index: Any) -> None:
    """Check that the parts of an index fit each other, so that a search stays inside them.

    Raises:
        ValueError: if they do not.
    """
    import faiss

    for part in walk(index):
        name = type(part).__name__
        if not part.is_trained:
            raise ValueError(f"{name} is not trained")
        if part.d < 1 or part.ntotal < 0:
            raise ValueError(f"{name} of {part.ntotal} rows of width {part.d}")
        if isinstance(part, faiss.IndexIVF):
            _check_lists(part)
        elif isinstance(part, faiss.IndexFastScan):
            _check_blocks(part)
        elif isinstance(part, faiss.IndexFlatCodes):
            _same(name, "bytes of codes", part.codes.size(), part.ntotal * part.code_size)
            if isinstance(part, faiss.IndexFlat):
                _same(name, "bytes per row", part.code_size, 4 * part.d)
            elif isinstance(part, faiss.IndexLSH):
                _check_bits(part)
        elif isinstance(part, faiss.IndexHNSW):
            _check_hnsw(part)
        elif isinstance(part, faiss.IndexNSG):
            _check_nsg(part)
        elif isinstance(part, faiss.IndexPreTransform):
            _check_chain(part)
        elif isinstance(part, faiss.IndexRefine):
            for inner in (part.base_index, part.refine_index):
                _same(name, "rows inside", inner.ntotal, part.ntotal)
                _same(name, "width inside", inner.d, part.d)
        if hasattr(part, "rabitq") and (part.rabitq.d != part.d or not 1 <= part.rabitq.nb_bits <= 9):
            raise ValueError(f"{name}: codes of {part.rabitq.nb_bits} bits for width {part.rabitq.d}")
        is_fast_scan = isinstance(part, faiss.IndexFastScan | faiss.IndexIVFFastScan)
        for quantizer in (getattr(part, field, None) for field in _QUANTIZERS):
            if quantizer is not None and not is_fast_scan and hasattr(part, "code_size"):
                _same(name, "bytes a code", part.code_size, quantizer.code_size)
        if getattr(part, "code_size", 1) < 1:
            raise ValueError(f"{name}: codes of no bytes")
        if hasattr(part, "pq"):
            _check_product_quantizer(name, part)


def _check_lists(part: Any) -> None:
    import faiss
    import numpy as np

    name = type(part).__name__
    lists = part.invlists
    if lists is None:
        raise ValueError(f"{name} without its lists")
    _same(name, "lists", lists.nlist, part.nlist)
    _same(name, "lists of the quantizer", part.quantizer.ntotal, part.nlist)
    _same(name, "width of the quantizer", part.quantizer.d, part.d)
    if part.nprobe < 1:
        raise ValueError(f"{name} searches {part.nprobe} lists")
    if isinstance(part, faiss.IndexIVFFastScan) and part.bbs != _BLOCK_ROWS:
        raise ValueError(f"{name}: blocks of {part.bbs} rows")
    sizes = np.array([lists.list_size(number) for number in range(part.nlist)], dtype=np.int64)
    _same(name, "rows in its lists", int(sizes.sum()), part.ntotal)
    if not isinstance(part, faiss.IndexIVFFastScan):
        _same(name, "bytes a code", lists.code_size, part.code_size)
    for number in np.flatnonzero(sizes).tolist():
        ids = faiss.rev_swig_ptr(lists.get_ids(number), int(sizes[number]))
        if ids.min() < 0 or ids.max() >= part.ntotal:
            raise ValueError(f"{name}: list {number} names rows outside of {part.ntotal}")


def _check_bits(part: Any) -> None:
    """Check LSH, which takes the signs of a vector's numbers, or of their rotation, for its bits."""
    _same("IndexLSH", "bytes a code", part.code_size, -(-part.nbits // 8))
    if part.rotate_data:
        rotation = part.rrot
        _same("IndexLSH", "width into its rotation", rotation.d_in, part.d)
        _same("IndexLSH", "bits after its rotation", rotation.d_out, part.nbits)
        _check_matrix("IndexLSH", rotation)
    elif not 0 < part.nbits <= part.d:
        raise ValueError(f"IndexLSH: {part.nbits} bits for width {part.d}")
    if part.train_thresholds:
        _same("IndexLSH", "thresholds", part.thresholds.size(), part.nbits)


def _check_matrix(name: str, step: Any) -> None:
    _same(name, "numbers in a matrix", step.A.size(), step.d_in * step.d_out)
    if step.have_bias:
        _same(name, "numbers in a bias", step.b.size(), step.d_out)


def _check_blocks(part: Any) -> None:
    name, rows = type(part).__name__, -(-part.ntotal // _BLOCK_ROWS) * _BLOCK_ROWS
    _same(name, "rows a block", part.bbs, _BLOCK_ROWS)
    _same(name, "rows in blocks", part.ntotal2, rows)
    _same(name, "bytes of codes", part.codes.size(), rows // _BLOCK_ROWS * part.get_block_stride())


def _check_hnsw(part: Any) -> None:
    import faiss
    import numpy as np

    name, graph = type(part).__name__, part.hnsw
    _same(name, "rows stored", part.storage.ntotal, part.ntotal)
    _same(name, "width stored", part.storage.d, part.d)
    levels, offsets = faiss.vector_to_array(graph.levels), faiss.vector_to_array(graph.offsets)
    _same(name, "rows in the graph", len(levels), part.ntotal)
    if not part.ntotal:
        return
    per_level = faiss.vector_to_array(graph.cum_nneighbor_per_level)
    if levels.min() < 1 or levels.max() >= len(per_level) or not -1 <= graph.max_level < levels.max():
        raise ValueError(f"{name}: levels from {levels.min()} to {levels.max()}")
    neighbours = faiss.vector_to_array(graph.neighbors)
    room = per_level[levels].astype(np.uint64)
    if len(offsets) != len(levels) + 1 or offsets[-1] != len(neighbours) or (np.diff(offsets) != room).any():
        raise ValueError(f"{name}: places in the graph that do not fit its levels")
    kinds: Any = faiss  # its stubs lack CAGRA's
    if isinstance(part, kinds.IndexHNSWCagra) and part.base_level_only:
        # Its searches start at random rows and know no upper levels, which may be empty.
        if not 1 <= part.num_base_level_search_entrypoints <= _MOST_ENTRIES:
            raise ValueError(f"{name} enters at {part.num_base_level_search_entrypoints} rows")
    elif not 0 <= graph.entry_point < part.ntotal or graph.max_level > levels[graph.entry_point] - 1:
        raise ValueError(f"{name}: a graph that is entered at row {graph.entry_point} of {part.ntotal}")
    if len(neighbours) and (neighbours.min() < -1 or neighbours.max() >= part.ntotal):
        raise ValueError(f"{name}: a graph with rows outside of {part.ntotal}")
    if graph.efSearch < 1:
        raise ValueError(f"{name} keeps {graph.efSearch} candidates")


def _check_nsg(part: Any) -> None:
    import faiss

    name = type(part).__name__
    _same(name, "rows stored", part.storage.ntotal, part.ntotal)
    _same(name, "width stored", part.storage.d, part.d)
    if not part.ntotal:
        return
    if not part.nsg.is_built:
        raise ValueError(f"{name} without its graph")
    graph = part.nsg.get_final_graph()
    _same(name, "rows in the graph", graph.N, part.ntotal)
    neighbours = faiss.rev_swig_ptr(graph.data, graph.N * graph.K)
    if len(neighbours) and (neighbours.min() < -1 or neighbours.max() >= part.ntotal):
        raise ValueError(f"{name}: a graph with rows outside of {part.ntotal}")
    if not 0 <= part.nsg.enterpoint < part.ntotal:
        raise ValueError(f"{name}: a graph that is entered at row {part.nsg.enterpoint}")
    if part.nsg.search_L < 1:
        raise ValueError(f"{name} keeps {part.nsg.search_L} candidates")


def _check_chain(part: Any) -> None:
    import faiss

    name, width = type(part).__name__, part.d
    for step in _transforms(part):
        if isinstance(step, faiss.ITQTransform):
            _same("ITQTransform", "numbers in a mean", step.mean.size(), step.d_in)
            inner = step.pca_then_itq
            _same("ITQTransform", "width inside", inner.d_in, step.d_in)
            _same("ITQTransform", "width after it", inner.d_out, step.d_out)
            _check_matrix("ITQTransform", inner)
        elif isinstance(step, faiss.LinearTransform):
            _check_matrix(type(step).__name__, step)
        if not step.is_trained:
            raise ValueError(f"{type(step).__name__} is not trained")
        _same(name, "width into a step", step.d_in, width)
        width = step.d_out
    _same(name, "width after its steps", part.index.d, width)
    _same(name, "rows inside", part.index.ntotal, part.ntotal)


def _check_product_quantizer(name: str, part: Any) -> None:
    codes = part.pq
    if codes.M < 1 or codes.d % codes.M or not 1 <= codes.nbits <= 24:
        raise ValueError(f"{name}: codes of {codes.M} times {codes.nbits} bits for width {codes.d}")
    _same(name, "width of codes", codes.d, part.d)
    _same(name, "numbers in codebooks", codes.centroids.size(), codes.d * (1 << codes.nbits))


def _transforms(part: Any) -> list[Any]:
    import faiss

    if not isinstance(part, faiss.IndexPreTransform):
        return []
    chain: Any = part.chain  # FAISS's stubs have a list
    return [faiss.downcast_VectorTransform(chain.at(step)) for step in range(chain.size())]


def _measure(metric: int) -> str:
    import faiss

    names = {
        faiss.METRIC_INNER_PRODUCT: "inner product",
        faiss.METRIC_L2: "L2 distance",
        faiss.METRIC_L1: "L1 distance",
    }
    return names.get(metric, f"FAISS's measure {metric}")


def _same(name: str, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(f"{name}: {found} {what}, {wanted} expected")
