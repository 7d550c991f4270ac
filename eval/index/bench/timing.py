"""Times an index: batches for throughput, single queries for latency, and the processor's time.

One round is one visit to an index in a process of its own. Rounds go over all indices in turn, so that a
busy machine slows all of them down alike.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.index import structure
from pipeline.core.arrays import Float32Array
from pipeline.core.records import ConfigError

LEAST_SECONDS = 0.2  # of a round's batches
WARM_UP_QUERIES = 64
SINGLE_QUERIES = 50  # of a round, so that a few rounds tell the 99th percentile
SINGLE_SECONDS = 0.5  # at most, with at least 10 queries
PERCENTILES = (50, 95, 99)
_LEAST_SINGLE = 10

Search = Callable[[Float32Array, int], tuple[Any, Any]]  # (queries, k) → (scores, rows)


@dataclass(frozen=True, slots=True)
class Round:
    """One visit to an index with one setting and one set of queries."""

    session: str  # the command that measured it
    number: int  # of the round in it
    queries_per_second: float  # in batches
    cpu_ms: float  # milliseconds of all threads for one query in a batch
    latencies_us: list[int]  # microseconds of single queries
    load: float  # of the machine, in runnable processes over the last minute

    @property
    def key(self) -> tuple[str, int]:
        return self.session, self.number


def check_timing(rounds: int, batch: int | None) -> None:
    """Check the options of the command line.

    Raises:
        ConfigError: for fewer than 2 rounds, or an empty batch.
    """
    if rounds < 2:
        raise ConfigError(f"--rounds {rounds}: give at least 2, which tell the noise")
    if batch is not None and batch < 1:
        raise ConfigError(f"--batch {batch}: give at least 1")


def time_batches(search: Search, queries_QD: Float32Array, k: int, batch: int) -> tuple[float, float]:
    """Return (queries per second, CPU milliseconds per query) of searches in batches, after a warm-up."""
    search(queries_QD[:WARM_UP_QUERIES], k)
    starts = range(0, max(1, len(queries_QD) - batch + 1), batch)  # whole batches
    done, place = 0, 0
    cpu, start = time.process_time(), time.perf_counter()
    while True:
        first = starts[place % len(starts)]
        done += len(search(queries_QD[first : first + batch], k)[0])
        place += 1
        seconds = time.perf_counter() - start
        if seconds >= LEAST_SECONDS:
            return done / seconds, 1000 * (time.process_time() - cpu) / done


def time_single(search: Search, queries_QD: Float32Array, k: int) -> list[int]:
    """Return the microseconds of searches for one query each, evenly spaced over the queries."""
    count = min(SINGLE_QUERIES, len(queries_QD))
    found, began = list[int](), time.perf_counter()
    for place in (np.arange(count) * len(queries_QD) // count).tolist():
        start = time.perf_counter()
        search(queries_QD[place : place + 1], k)
        end = time.perf_counter()
        found.append(max(1, round((end - start) * 1e6)))
        if end - began > SINGLE_SECONDS and len(found) >= _LEAST_SINGLE:
            break
    return found


def percentile_ms(latencies_us: Sequence[int], percentile: int) -> float | None:
    """Return a percentile of microseconds in milliseconds, or None for too few."""
    if len(latencies_us) * (100 - percentile) < 100:  # less than one query lies above
        return None
    return float(np.percentile(latencies_us, percentile)) / 1000


def spread_of(speeds: Sequence[float]) -> float | None:
    """Return half the middle half of the rounds' speeds as a share of the median, or None below 3."""
    if len(speeds) < 3:
        return None
    low, middle, high = statistics.quantiles(speeds, method="inclusive")
    return (high - low) / 2 / middle


def reset_counts() -> None:
    """Set FAISS's counts of distances to zero."""
    import faiss

    counts: Any = faiss.cvar  # FAISS has no types for it
    counts.indexIVF_stats.reset()
    counts.hnsw_stats.reset()


def distances(index: Any, num_queries: int, k: int) -> float | None:
    """Return how many rows and centroids a query was compared with, or None if FAISS does not count them.

    `reset_counts` and one search for the queries come first. Codes count as rows do.
    """
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return distances(index.index, num_queries, k)
    if isinstance(index, faiss.IndexRefine):
        inside = distances(index.base_index, num_queries, k)
        return None if inside is None else inside + min(index.ntotal, index.k_factor * k)
    if structure.has_nsg(index):
        return None
    counts: Any = faiss.cvar
    graph = counts.hnsw_stats.ndis / num_queries
    if isinstance(index, faiss.IndexIVF):
        lists = counts.indexIVF_stats.ndis / num_queries
        return float(lists + (graph or index.quantizer.ntotal))
    return float(graph or index.ntotal)
