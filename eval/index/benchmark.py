"""`cnclip bench-index`: measures the cost and quality of approximate indices against exact search.

For each factory string and each setting of its search parameter, it measures recall at k against exact
search, queries per second, seconds to build, bytes per vector and resident memory. It reports the Pareto
front (no other point is at least as good in recall, speed and size, and better in one) and the fastest point
that meets a target.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.index import structure
from eval.index.build import fill, new_index, train
from eval.index.device import Device, check_device, to_device
from eval.index.embeddings import Embeddings
from eval.index.partitioned import set_parameters
from eval.metrics.recall import exact_scores_of_pairs, score_error_bound
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.records import InputError
from pipeline.core.text_table import align

_MIN_SECONDS = 0.2  # repeat a setting's searches for at least this long
_BLOCK_ROWS = 16_384


@dataclass(frozen=True, slots=True)
class Point:
    """One index with one setting."""

    factory: str
    parameters: str  # empty if the index has none
    recall: float  # share of the exact k that it found, 0 to 1
    queries_per_second: float
    build_seconds: float  # training and adding
    bytes_per_vector: float  # of the serialised index
    resident_bytes: int  # growth of this process's memory during the build

    def dominates(self, other: "Point") -> bool:
        """Return whether this point is at least as good in recall, speed and size, and better in one."""
        mine = (self.recall, self.queries_per_second, -self.bytes_per_vector)
        theirs = (other.recall, other.queries_per_second, -other.bytes_per_vector)
        return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


def default_grid(num_rows: int, dim: int) -> list[str]:
    """Return factory strings worth trying at this size, with about 4 √n lists and codes of dim / 8 bytes."""
    lists = num_lists(num_rows)
    code = max(1, dim // 8)
    grid = ["Flat", "SQ8", "HNSW32", f"IVF{lists},Flat", f"IVF{lists},SQ8", f"IVF{lists},PQ{code}"]
    grid += [f"OPQ{code},IVF{lists},PQ{code}", f"IVF{lists},RaBitQ"]
    return grid


def num_lists(num_rows: int) -> int:
    """Return the number of inverted lists: a power of two near 4 √n, with 39 rows to train each list."""
    return int(2 ** np.floor(np.log2(max(1.0, min(4 * num_rows**0.5, num_rows / 39)))))


def settings(factory: str, dim: int) -> list[str]:
    """Return the search parameters to sweep for a factory string, from the index that FAISS builds for it."""
    index = new_index(dim, factory)
    lists = structure.num_lists(index)
    if lists is not None:
        return [f"nprobe={n}" for n in (1, 4, 16, 64, 256) if n <= lists]
    if structure.has_graph(index):
        return [f"efSearch={n}" for n in (16, 64, 256)]
    return [""]


def exact_neighbours(embeddings: Embeddings, queries_QD: Float32Array, k: int) -> Int64Array:
    """Return the rows of the k highest dot products, [Q, k], from matrix products of one block at a time."""
    best_scores = np.full((len(queries_QD), k), -np.inf, dtype=np.float32)
    best_rows = np.full((len(queries_QD), k), -1, dtype=np.int64)
    first = 0
    for block_BD in embeddings.blocks(0, embeddings.num_rows):
        for start in range(0, len(block_BD), _BLOCK_ROWS):
            part = block_BD[start : start + _BLOCK_ROWS]
            scores = np.concatenate([best_scores, queries_QD @ part.T], axis=1)
            rows = np.arange(first, first + len(part))
            first += len(part)
            all_rows = np.concatenate(
                [best_rows, np.broadcast_to(rows, (len(queries_QD), len(rows)))], axis=1
            )
            top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
            best_scores = np.take_along_axis(scores, top, axis=1)
            best_rows = np.take_along_axis(all_rows, top, axis=1)
    order = np.lexsort((best_rows, -best_scores), axis=1)
    return np.take_along_axis(best_rows, order, axis=1)


def recall_at(
    embeddings: Embeddings, queries_QD: Float32Array, found_QK: Int64Array, exact_QK: Int64Array
) -> float:
    """Return the mean share of each query's k results that are as near as the k nearest rows.

    Rows that tie with the k-th count, because web corpora contain many duplicates in arbitrary order. Rows of
    -1 were not found.
    """
    bound = score_error_bound(embeddings.dim)
    rows, inverse = np.unique(np.concatenate([found_QK, exact_QK], axis=1), return_inverse=True)
    vectors_RD = np.zeros((len(rows), embeddings.dim), dtype=np.float32)
    vectors_RD[rows >= 0] = embeddings.rows(rows[rows >= 0])
    num_queries, k = found_QK.shape
    query_rows = np.repeat(np.arange(num_queries), 2 * k)
    scores_QK2 = exact_scores_of_pairs(queries_QD, query_rows, vectors_RD, inverse.ravel()).reshape(
        num_queries, 2 * k
    )
    least_Q1 = scores_QK2[:, k:].min(axis=1, keepdims=True) - bound
    return float(((scores_QK2[:, :k] >= least_Q1) & (found_QK >= 0)).mean())


def measure(
    embeddings: Embeddings,
    queries_QD: Float32Array,
    grid: Sequence[str],
    *,
    k: int,
    train_rows: int,
    device: Device = "cpu",
    say: Callable[[str], None],
) -> list[Point]:
    """Build and sweep every factory string.

    Strings that FAISS refuses at this size are reported and left out.

    Raises:
        InputError: for k above the number of rows, for queries of another width, and if FAISS refuses all.
        ConfigError: if FAISS has no such device.
    """
    check_device(device)
    if not 0 < k <= embeddings.num_rows:
        raise InputError(f"{embeddings.paths[0]}: k = {k}, but there are {embeddings.num_rows} rows")
    if queries_QD.shape[1] != embeddings.dim:
        raise InputError(
            f"queries of width {queries_QD.shape[1]} do not fit embeddings of width {embeddings.dim}:"
            " they belong to another model"
        )
    exact_QK = exact_neighbours(embeddings, queries_QD, k)
    points = []
    for factory in grid:
        memory = _resident_bytes()
        start = time.perf_counter()
        try:
            empty = train(embeddings, factory, train_rows, device)
            built = fill(empty, embeddings, 0, embeddings.num_rows, factory, device)
        except InputError as error:
            say(f"left out: {error}")
            continue
        seconds = time.perf_counter() - start
        grown = max(0, _resident_bytes() - memory)
        size = _serialised_bytes(built) / embeddings.num_rows
        index = to_device(built, device, factory)
        for parameters in settings(factory, embeddings.dim):
            set_parameters(index, parameters, device)
            found_QK, speed = _search(index, queries_QD, k)
            point = Point(
                factory,
                parameters,
                recall_at(embeddings, queries_QD, found_QK, exact_QK),
                speed,
                seconds,
                size,
                grown,
            )
            say(f"{factory} {parameters}: recall {point.recall:.3f}, {speed:,.0f} queries/s")
            points.append(point)
        del empty, built, index
    if not points:
        raise InputError("FAISS can build none of the grid's factory strings here")
    return points


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other dominates, in order of decreasing recall."""
    front = [point for point in points if not any(other.dominates(point) for other in points)]
    return sorted(front, key=lambda point: (-point.recall, -point.queries_per_second))


def best_point(points: Sequence[Point], target_recall: float, bytes_per_vector: float) -> Point | None:
    """Return the fastest measured point that reaches the recall within the size, or None."""
    fitting = [
        point
        for point in points
        if point.recall >= target_recall and point.bytes_per_vector <= bytes_per_vector
    ]
    return max(fitting, key=lambda point: point.queries_per_second, default=None)


def suggest(num_rows: int, dim: int, memory_bytes: float, target_recall: float) -> str:
    """Return a factory string to start from, for a size, memory and target recall.

    This measures nothing.

    The index is exact below 20,000 rows or for a target of 1. Otherwise it has the most exact codes that fit:
    float32, 8 bits or PQ. It is HNSW if the graph fits and the corpus has under a million rows, because
    adding rows to HNSW takes 10 to 20 times as long.

    Raises:
        InputError: if not even the smallest codes fit.
    """
    per_vector = memory_bytes / num_rows
    if num_rows < 20_000 or target_recall >= 1:
        if per_vector < 4 * dim:
            raise InputError(
                f"exact search over {num_rows} rows takes {4 * dim * num_rows / 2**30:.1f} GiB; give more"
                " memory or a recall below 1"
            )
        return "Flat"
    lists = num_lists(num_rows)
    ids = 8
    if num_rows < 1_000_000 and target_recall >= 0.95 and per_vector >= 4 * dim + 4 * 2 * 32 + ids:
        return "HNSW32"
    if per_vector >= 4 * dim + ids:
        return f"IVF{lists},Flat"
    if per_vector >= dim + ids:
        return f"IVF{lists},SQ8"
    for divisor in (4, 8, 16):
        code = dim // divisor
        if code and per_vector >= code + ids:
            return f"OPQ{code},IVF{lists},PQ{code}"
    raise InputError(
        f"{memory_bytes / 2**20:.0f} MiB for {num_rows} rows are {per_vector:.1f} bytes per vector; the"
        f" smallest codes offered take {dim // 16 + ids}: give more memory or split the corpus"
    )


def points_table(points: Sequence[Point], k: int) -> str:
    """Return aligned text that marks the Pareto front with a star."""
    front = pareto_front(points)
    rows = [("", "factory", "setting", f"recall@{k}", "queries/s", "build s", "bytes/vector", "MiB")]
    for point in points:
        rows.append(
            (
                "*" if point in front else "",
                point.factory,
                point.parameters,
                f"{point.recall:.4f}",
                f"{point.queries_per_second:,.0f}",
                f"{point.build_seconds:.2f}",
                f"{point.bytes_per_vector:.1f}",
                f"{point.resident_bytes / 2**20:.0f}",
            )
        )
    return align(rows, (False, False, False, True, True, True, True, True))


def front_plot(points: Sequence[Point], k: int) -> str:
    """Return an SVG of queries per second over recall: a line for each factory string, rings on the front."""
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bench-index", "font.size": 9}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for factory in dict.fromkeys(point.factory for point in points):
            line = [point for point in points if point.factory == factory]
            recall = [point.recall for point in line]
            speed = [point.queries_per_second for point in line]
            size = line[0].bytes_per_vector
            axes.plot(recall, speed, marker="o", markersize=3, linewidth=1, label=f"{factory}  {size:.0f} B")
        front = pareto_front(points)
        axes.scatter(
            [point.recall for point in front],
            [point.queries_per_second for point in front],
            s=60,
            facecolors="none",
            edgecolors="black",
            linewidths=0.8,
        )
        axes.set_yscale("log")
        axes.set_xlabel(f"recall@{k} against exact search")
        axes.set_ylabel("queries per second")
        axes.legend(fontsize=7, frameon=False)
        axes.grid(linewidth=0.4)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _search(index: Any, queries_QD: Float32Array, k: int) -> tuple[Int64Array, float]:
    """Return (rows, queries per second) of the fastest repetition, since other programs only slow it down."""
    best, total = float("inf"), 0.0
    while total < _MIN_SECONDS:
        start = time.perf_counter()
        _, found_QK = index.search(queries_QD, k)
        seconds = time.perf_counter() - start
        best, total = min(best, seconds), total + seconds
    return found_QK, len(queries_QD) / best


def _serialised_bytes(index: Any) -> int:
    import faiss

    return int(faiss.serialize_index(index).nbytes)


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)
