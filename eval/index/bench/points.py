"""What `cnclip bench-index` measured: points, what to sweep, and the best point for a target."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from eval.index.bench.timing import PERCENTILES, Round, percentile_ms, spread_of
from eval.index.build import new_index
from eval.index.structure import quantised_bits, refines_hamming
from eval.index.tuning.suggest import num_lists
from eval.index.tuning.tune import Knobs, join_parameters
from eval.metrics.bootstrap import Measured

IN_DISTRIBUTION = "held-out"  # the queries with which others are compared
_SWEPT_REFINE = (1, 4, 16, 64)
_SWEPT_MORE = (256, 1024)  # the same for LSH
_SWEPT_BITS = (4, 8)  # of RaBitQ's queries: FAISS's default, and from where on recall stays


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One index with one setting, asked by one set of queries."""

    factory: str
    parameters: str  # empty if the index has none
    queries: str = IN_DISTRIBUTION  # name of the set
    recall: float  # share of the exact k that it found, 0 to 1; rows as near as the k-th count
    strict_recall: float = 0.0  # only the rows of the ground truth count
    ann_benchmarks_recall: float | None = None  # as its evaluator counts
    big_ann_recall: float | None = None  # as its evaluator counts; None for a ground truth without scores
    recall_error: float = 0.0  # standard error of the recall, had other queries asked
    queries_per_second: float  # median of the rounds; 0 before the first
    build_seconds: float  # training and adding
    bytes_per_vector: float  # of the file
    resident_bytes: int  # growth of the memory of the process that searches, when it loads the index
    peak_bytes: int = 0  # its highest growth while it searches
    build_peak_bytes: int = 0  # the most memory of the process that builds
    gap: float | None = None  # recall of held-out images, minus this recall
    task: dict[str, Measured] | None = None  # r1, r5, r10 in percent, if there are labels
    distances: float | None = None  # rows and centroids that a query was compared with
    copy: int = 0  # of a factory that is listed several times, which shows the noise
    rounds: tuple[Round, ...] = ()

    @property
    def name(self) -> str:
        return self.factory if not self.copy else f"{self.factory} #{self.copy + 1}"

    @property
    def key(self) -> tuple[str, str, int, str]:
        """Return what tells the points of one run apart."""
        return self.queries, self.factory, self.copy, self.parameters

    @property
    def twin_key(self) -> tuple[str, str, str]:
        """Return what points of one and the same index share."""
        return self.queries, self.factory, self.parameters

    @property
    def spread(self) -> float | None:
        """Return half the middle half of the rounds' speeds as a share of the median, or None below 3."""
        return spread_of([each.queries_per_second for each in self.rounds])

    @property
    def cpu_ms(self) -> float | None:
        """Return the median of milliseconds of all threads for one query in a batch."""
        return statistics.median(each.cpu_ms for each in self.rounds) if self.rounds else None

    def latency_ms(self, percentile: int) -> float | None:
        """Return a percentile of the milliseconds of single queries in all rounds, or None for too few."""
        return percentile_ms([taken for each in self.rounds for taken in each.latencies_us], percentile)

    def with_round(self, timed: Round) -> "Point":
        """Return the point with one round more."""
        rounds = (*self.rounds, timed)
        speed = statistics.median(each.queries_per_second for each in rounds)
        return replace(self, rounds=rounds, queries_per_second=speed)

    def figures(self) -> dict[str, Any]:
        """Return all fields and what the rounds tell, for a file."""
        told = {f"p{percentile}_ms": self.latency_ms(percentile) for percentile in PERCENTILES}
        return {**asdict(self), "spread": self.spread, "cpu_ms": self.cpu_ms, **told}


def default_grid(num_rows: int, dim: int) -> list[str]:
    """Return factory strings worth trying at this size, with about 4 √n lists and codes of dim / 8 bytes."""
    lists = num_lists(num_rows)
    code = max(1, dim // 8)
    grid = ["Flat", "SQ8", "HNSW32", f"IVF{lists},Flat", f"IVF{lists},SQ8", f"IVF{lists},PQ{code}"]
    grid += [f"OPQ{code},IVF{lists},PQ{code}", f"IVF{lists},RaBitQ", f"IVF{lists},RaBitQ,Refine(SQ8)"]
    return grid


def settings(factory: str, dim: int, num_rows: int) -> list[str]:
    """Return the search parameters to sweep for a factory string, from the index that FAISS builds for it.

    The last ones look at all lists, 2,048 candidates and 64 times k refined rows (1,024 for LSH).
    """
    index = new_index(dim, factory)
    knobs = Knobs.of(index, num_rows)
    efforts = [1 if knobs.effort == "nprobe" else min(16, knobs.most)]
    while efforts[-1] < knobs.most:
        efforts.append(min(4 * efforts[-1], knobs.most))
    swept = []
    refine = (*_SWEPT_REFINE, *_SWEPT_MORE) if refines_hamming(index) else _SWEPT_REFINE
    for more in knobs.settings({"k_factor_rf": refine}):
        swept += (
            [join_parameters({knobs.effort: value}, more) for value in efforts] if knobs.effort else [more]
        )
    if quantised_bits(index) is None:
        return swept
    return [
        ",".join(part for part in (f"qb={bits}", setting) if part)
        for bits in _SWEPT_BITS
        for setting in swept
    ]


def with_gaps(points: Sequence[Point]) -> list[Point]:
    """Return the points with their `gap`, if the same index was asked by held-out rows, too."""
    inside = {
        (point.factory, point.copy, point.parameters): point.recall
        for point in points
        if point.queries == IN_DISTRIBUTION
    }
    found = []
    for point in points:
        known = inside.get((point.factory, point.copy, point.parameters))
        if known is not None and point.queries != IN_DISTRIBUTION:
            point = replace(point, gap=known - point.recall)
        found.append(point)
    return found


def best_point(points: Sequence[Point], target_recall: float, bytes_per_vector: float) -> Point | None:
    """Return the fastest measured point that reaches the recall within the size, or None."""
    fitting = [
        point
        for point in points
        if point.recall >= target_recall and point.bytes_per_vector <= bytes_per_vector
    ]
    return max(fitting, key=lambda point: point.queries_per_second, default=None)
