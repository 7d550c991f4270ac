"""Finds the search parameters with which an index reaches a recall at the least cost.

FAISS's `ParameterSpace` says which parameters an index has. More lists (`nprobe`) or candidates (`efSearch`)
never lower recall, so a bisection finds the least number that reaches the target for each value of the other
parameters, and the clock decides between those. Half of the queries choose, the other half measure.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from eval.index import structure
from eval.index.truth import Truth, exact_neighbours, recall_of, without_own
from eval.index.tuning.parameters import Tuned
from eval.index.tuning.queries import Queries
from eval.index.views import Vectors
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.records import ConfigError, InputError

NUM_QUERIES = 4000  # half of them choose: a recall of 0.5 is then known to ±0.01
MOST_CANDIDATES = 2048  # efSearch and search_L
_REFINE = (1, 2, 4, 8, 16, 32, 64)  # k_factor_rf: candidates for exact scores, in multiples of k
_MORE_REFINE = (128, 256, 512, 1024)  # the same for LSH's bits, which order rows coarsely
_QUANTIZER = (16, 64, 256)  # quantizer_efSearch
_CLOSE = 0.005  # recall above the target from which fewer codes are tried
_CEILING = 0.001  # recall that is not worth a dearer setting if the target is out of reach
_FINE = 32  # a bisection ends within 1/32 of its number
_ROUNDS = 3
_TIMED_QUERIES = 200


@dataclass(frozen=True, slots=True)
class Knobs:
    """The search parameters of a kind of index."""

    effort: str | None  # nprobe, efSearch or search_L; None if every search looks at all rows
    most: int  # its highest useful value
    others: tuple[tuple[str, tuple[int, ...]], ...]  # further parameters with ascending values
    mean_codes: float | None = None  # rows of one list; None for an index without lists

    @classmethod
    def of(cls, index: Any, num_rows: int) -> "Knobs":
        """Return the parameters of a FAISS index of so many rows; it may be empty still."""
        import faiss

        space: Any = faiss.ParameterSpace()
        space.initialize(index)
        ranges = space.parameter_ranges
        names = [ranges.at(number).name for number in range(ranges.size())]
        refine = (*_REFINE, *_MORE_REFINE) if structure.refines_hamming(index) else _REFINE
        others = tuple(
            (name, values)
            for name, values in (("k_factor_rf", refine), ("quantizer_efSearch", _QUANTIZER))
            if name in names
        )
        lists = structure.num_lists(index)
        if lists is not None:
            return cls("nprobe", lists, others, num_rows / lists)
        candidates = max(1, min(num_rows, MOST_CANDIDATES))
        if "efSearch" in names:
            return cls("efSearch", candidates, others)
        if structure.has_nsg(index):
            return cls("search_L", candidates, others)
        return cls(None, 1, others)

    @property
    def is_empty(self) -> bool:
        return self.effort is None and not self.others

    def settings(self, only: Mapping[str, tuple[int, ...]] | None = None) -> Iterator[str]:
        """Yield every combination of the further parameters, the cheapest first.

        `only` has the values of some of them that are to be tried.
        """
        others = {name: (only or {}).get(name, values) for name, values in self.others}
        for values in itertools.product(*others.values()):
            yield join_parameters(dict(zip(others, values, strict=True)))


@dataclass(frozen=True, slots=True)
class Chosen:
    """Search parameters and the recall on the queries that chose them."""

    parameters: str
    recall: float
    is_reached: bool


def join_parameters(values: dict[str, int], more: str = "") -> str:
    """Return FAISS's string, such as `k_factor_rf=4,nprobe=16`."""
    return ",".join(part for part in (more, *(f"{name}={value}" for name, value in values.items())) if part)


def tune(
    knobs: Knobs, recall_of: Callable[[str], float], seconds_of: Callable[[str], float], target: float
) -> Chosen:
    """Return the fastest parameters that reach the target, else the cheapest of the best ones.

    `recall_of` and `seconds_of` search with FAISS's string.
    """
    measured: dict[str, float] = {}

    def recall(parameters: str) -> float:
        if parameters not in measured:
            measured[parameters] = recall_of(parameters)
        return measured[parameters]

    reaching, most, first = list[str](), knobs.most, 1
    for more in knobs.settings():
        found = _least(knobs, more, first, most, recall, target)
        if found is None:
            continue
        reaching.append(_at(knobs, more, found))
        if found == most and len(reaching) > 1 and len(knobs.others) == 1:
            break  # dearer settings save nothing any more
        first, most = max(1, found // 2), found
    if not reaching:
        ceiling = max(measured.values())
        best = next(name for name, value in measured.items() if value >= ceiling - _CEILING)
        return Chosen(best, measured[best], False)
    chosen = _fewer_codes(knobs, _fastest(reaching, seconds_of), recall, target)
    return Chosen(chosen, measured[chosen], True)


def _at(knobs: Knobs, more: str, effort: int) -> str:
    return more if knobs.effort is None else join_parameters({knobs.effort: effort}, more)


def _least(
    knobs: Knobs, more: str, first: int, most: int, recall_of: Callable[[str], float], target: float
) -> int | None:
    """Return the least effort up to `most` that reaches the target, or None.

    It doubles from `first` on, because what is dear is tried last, and bisects then.
    """

    def reaches(effort: int) -> bool:
        return recall_of(_at(knobs, more, effort)) >= target

    low, high = 0, min(first, most)
    if reaches(high):
        while high > 1 and reaches(high // 2):
            high //= 2
        low = high // 2
    else:
        while True:
            low = high
            if low >= most:
                return None
            high = min(2 * high, most)
            if reaches(high):
                break
    while high - low > max(1, low // _FINE):
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _fastest(settings: list[str], seconds_of: Callable[[str], float]) -> str:
    """Return the setting with the least median time; all take turns, so that noise hits them alike."""
    if len(settings) == 1:
        return settings[0]
    taken = [[seconds_of(setting) for setting in settings] for _ in range(_ROUNDS)]
    medians = [statistics.median(times) for times in zip(*taken, strict=True)]
    return settings[medians.index(min(medians))]


def _fewer_codes(knobs: Knobs, parameters: str, recall_of: Callable[[str], float], target: float) -> str:
    """Limit the codes of a query if a whole list less would miss the target and one more overshoots it."""
    if knobs.mean_codes is None or recall_of(parameters) < target + _CLOSE:
        return parameters
    lists = next(int(part.split("=")[1]) for part in parameters.split(",") if part.startswith("nprobe="))
    low, high = 0, int(4 * lists * knobs.mean_codes) + 1  # lists that queries fall into are larger than most
    best = parameters
    while high - low > max(1, low // _FINE):
        middle = (low + high) // 2
        limited = join_parameters({"max_codes": middle}, parameters)
        if recall_of(limited) >= target:
            high, best = middle, limited
        else:
            low = middle
    # Some kinds ignore the limit.
    return best if recall_of(best) < recall_of(parameters) else parameters


@dataclass(frozen=True, slots=True)
class Tuning:
    """What to tune an index to.

    Raises:
        ConfigError: for a recall outside 0 to 1, or a k below 1.
    """

    queries: Queries
    target: float  # recall against exact search
    k: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ConfigError(f"--recall {self.target}: give a share above 0 and up to 1")
        if self.k < 1:
            raise ConfigError(f"--k {self.k}: give at least 1")

    def is_of(self, tuned: Tuned) -> bool:
        """Return whether this would find the parameters that are there."""
        return (tuned.k, tuned.target, tuned.queries_digest) == (self.k, self.target, self.queries.digest)


def tune_index(
    sample: Any,
    search: Callable[[Float32Array, int, str], Int64Array],
    vectors: Vectors,
    tuning: Tuning,
    *,
    is_for_file: bool = False,
    measuring: Queries | None = None,
) -> Tuned:
    """Tune an index on half of the queries and measure it on the other half.

    Args:
        sample: a FAISS index of its kind: the whole, or one part.
        search: (queries, k, parameters) → rows of all parts.
        vectors: its rows, which tell the exact neighbours.
        tuning: queries, target and k.
        is_for_file: whether FAISS's file must hold the parameters and equal inputs give equal bytes: the
            clock does not choose, and codes are not limited, which the file has no place for.
        measuring: queries that measure it instead, so that all of the tuning's queries choose.

    Queries that are rows of the index do not count as their own answers.

    Raises:
        InputError: if the index holds fewer rows than are asked for, or there is one query.
    """
    queries, k, knobs = tuning.queries, tuning.k, Knobs.of(sample, sample.ntotal)
    asked = k + queries.are_own  # one more, since each finds itself
    if structure.is_exact(sample):
        source = "exact search needs no queries"
        return Tuned("", k, tuning.target, 1.0, True, source, queries.digest, 0, 0)
    if asked > vectors.num_rows:
        raise InputError(
            f"{vectors.paths[0]}: {vectors.num_rows} rows, fewer than the {asked} that are asked for; give a"
            " smaller --k"
        )
    if len(queries) < 2:
        raise InputError(f"{queries.source}: tuning takes one to choose and one to measure; give more")

    def found(asking: Queries, parameters: str) -> Int64Array:
        found_QK = search(asking.vectors_QD, k + asking.are_own, parameters)
        return drop_own(found_QK, asking.rows_Q) if asking.are_own else found_QK

    def recall_on(asking: Queries) -> Callable[[str], float]:
        truth = exact_neighbours(vectors, asking.vectors_QD, k + asking.are_own)
        if asking.are_own:
            truth = without_own(truth, asking.rows_Q)
        return lambda parameters: (
            recall_of(vectors, asking.vectors_QD, found(asking, parameters), truth).with_ties
        )

    choosing = queries if measuring is not None else queries.part(0, 2)
    measuring = measuring or queries.part(1, 2)
    few_QD = choosing.vectors_QD[:_TIMED_QUERIES]

    def seconds_of(parameters: str) -> float:
        start = time.perf_counter()
        search(few_QD, k, parameters)
        return time.perf_counter() - start

    if is_for_file:
        knobs = replace(knobs, mean_codes=None)
    cost_of = (lambda parameters: 0.0) if is_for_file else seconds_of  # equal costs: the first
    chosen = tune(knobs, recall_on(choosing), cost_of, tuning.target)
    recall = recall_on(measuring)(chosen.parameters)
    return Tuned(
        chosen.parameters,
        k,
        tuning.target,
        round(recall, 6),
        chosen.is_reached,
        measuring.source,
        queries.digest,
        len(measuring),
        len(choosing),
    )


def drop_own(found_QK: Int64Array, own_rows_Q: Int64Array) -> Int64Array:
    """Return one column less: without each query's own row, or without the last one if that is not there."""
    return without_own(Truth(found_QK), own_rows_Q).rows_QK
