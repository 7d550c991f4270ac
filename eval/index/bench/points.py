"""What `cnclip bench-index` measured: points, their Pareto front, and the best one for a target."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from eval.index.build import new_index
from eval.index.tuning.suggest import num_lists
from eval.index.tuning.tune import Knobs, join_parameters
from eval.metrics.bootstrap import Measured
from pipeline.core.text_table import align

IN_DISTRIBUTION = "held-out"  # the queries with which others are compared
_SWEPT_REFINE = (1, 4, 16, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One index with one setting, asked by one set of queries."""

    factory: str
    parameters: str  # empty if the index has none
    queries: str = IN_DISTRIBUTION  # name of the set
    recall: float  # share of the exact k that it found, 0 to 1; rows as near as the k-th count
    strict_recall: float = 0.0  # only the rows of the ground truth count
    queries_per_second: float
    build_seconds: float  # training and adding
    bytes_per_vector: float  # of the file
    resident_bytes: int  # growth of the memory of the process that searches, when it loads the index
    peak_bytes: int = 0  # its highest growth while it searches
    build_peak_bytes: int = 0  # the most memory of the process that builds
    gap: float | None = None  # recall of held-out images, minus this recall
    task: dict[str, Measured] | None = None  # r1, r5, r10 in percent, if there are labels

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


def settings(factory: str, dim: int, num_rows: int) -> list[str]:
    """Return the search parameters to sweep for a factory string, from the index that FAISS builds for it.

    The last ones look at all lists, 2,048 candidates and 64 times k refined rows.
    """
    knobs = Knobs.of(new_index(dim, factory), num_rows)
    efforts = [1 if knobs.effort == "nprobe" else min(16, knobs.most)]
    while efforts[-1] < knobs.most:
        efforts.append(min(4 * efforts[-1], knobs.most))
    swept = []
    for more in knobs.settings({"k_factor_rf": _SWEPT_REFINE}):
        swept += (
            [join_parameters({knobs.effort: value}, more) for value in efforts] if knobs.effort else [more]
        )
    return swept


def with_gaps(points: Sequence[Point]) -> list[Point]:
    """Return the points with their `gap`, if the same index was asked by held-out rows, too."""
    inside = {
        (point.factory, point.parameters): point.recall
        for point in points
        if point.queries == IN_DISTRIBUTION
    }
    found = []
    for point in points:
        known = inside.get((point.factory, point.parameters))
        if known is not None and point.queries != IN_DISTRIBUTION:
            point = replace(point, gap=known - point.recall)
        found.append(point)
    return found


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other of the same queries dominates, in order of decreasing recall."""
    front = [
        point
        for point in points
        if not any(other.queries == point.queries and other.dominates(point) for other in points)
    ]
    return sorted(front, key=lambda point: (-point.recall, -point.queries_per_second))


def best_point(points: Sequence[Point], target_recall: float, bytes_per_vector: float) -> Point | None:
    """Return the fastest measured point that reaches the recall within the size, or None."""
    fitting = [
        point
        for point in points
        if point.recall >= target_recall and point.bytes_per_vector <= bytes_per_vector
    ]
    return max(fitting, key=lambda point: point.queries_per_second, default=None)


def points_table(points: Sequence[Point], k: int, exact: dict[str, dict[str, Measured]]) -> str:
    """Return aligned text that marks the Pareto front with a star.

    `exact` has the task's recall of exact search for each set of queries with labels; the loss against it
    follows each R@K.
    """
    front, num_sets = pareto_front(points), len({point.queries for point in points})
    has_gap = any(point.gap is not None for point in points)
    head = ["", "factory", "setting", "queries", f"recall@{k}", "strict", "gap"]
    head += ["queries/s", "build s", "bytes/vector", "MiB"]
    head += [f"{name.upper().replace('R', 'R@')} (loss)" for name in ("r1", "r5", "r10")]
    rows = [tuple(head)]
    for name, measured in exact.items():
        first = ["", "exact search", "", name, *[""] * 7]
        rows.append(
            (*first, *(f"{one.value:.1f} ±{(one.high - one.low) / 2:.1f}" for one in measured.values()))
        )
    for point in points:
        row = [
            "*" if point in front else "",
            point.factory,
            point.parameters,
            point.queries,
            f"{point.recall:.4f}",
            f"{point.strict_recall:.4f}",
            "" if point.gap is None else f"{point.gap:+.4f}",
            f"{point.queries_per_second:,.0f}",
            f"{point.build_seconds:.2f}",
            f"{point.bytes_per_vector:.1f}",
            f"{point.resident_bytes / 2**20:.0f}",
        ]
        if point.task is None or point.queries not in exact:
            row += [""] * 3
        else:
            of_exact = exact[point.queries]
            row += [
                f"{one.value:.1f} ({round(one.value - of_exact[name].value, 1) or 0.0:+.1f})"
                for name, one in point.task.items()
            ]
        rows.append(tuple(row))
    shown = [True] * 3 + [num_sets > 1, True, True, has_gap] + [True] * 4 + [bool(exact)] * 3
    right = (False, False, False, False, *[True] * 10)
    kept = [column for column, is_shown in enumerate(shown) if is_shown]
    return align(
        [tuple(row[column] for column in kept) for row in rows], tuple(right[column] for column in kept)
    )


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
