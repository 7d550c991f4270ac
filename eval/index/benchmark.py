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

from eval.index import structure
from eval.index.build import fill, new_index, rows_to_train, train
from eval.index.device import Device, check_device, to_device
from eval.index.embeddings import Embeddings
from eval.index.parameters import set_parameters
from eval.index.suggest import num_lists
from eval.index.truth import exact_neighbours, recall_of
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


def settings(factory: str, dim: int) -> list[str]:
    """Return the search parameters to sweep for a factory string, from the index that FAISS builds for it."""
    index = new_index(dim, factory)
    lists = structure.num_lists(index)
    if lists is not None:
        return [f"nprobe={n}" for n in (1, 4, 16, 64, 256) if n <= lists]
    if structure.has_graph(index):
        return [f"efSearch={n}" for n in (16, 64, 256)]
    return [""]


def measure(
    embeddings: Embeddings,
    queries_QD: Float32Array,
    grid: Sequence[str],
    *,
    k: int,
    train_rows: int | None,
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
            " they are of another model"
        )
    truth = exact_neighbours(embeddings, queries_QD, k)
    points = []
    for factory in grid:
        memory = _resident_bytes()
        start = time.perf_counter()
        try:
            rows = rows_to_train(embeddings.dim, factory) if train_rows is None else train_rows
            empty = train(embeddings, factory, rows, device)
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
                recall_of(embeddings, queries_QD, found_QK, truth).with_ties,
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
