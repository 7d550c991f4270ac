"""How scores, lengths and sizes are spread over the rows that a rule kept and those that it dropped.

A histogram is only counts: the edges belong to its name, so that a task's receipt stays small and the counts
of many tasks add up.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

# Name → edges: bin 0 is below the first edge, bin i is [edge i-1, edge i), the last from the last edge on.
EDGES: Mapping[str, Sequence[float]] = {
    "score": tuple(round(0.01 * step, 2) for step in range(10, 61)),  # cosine of the source's own scores
    "pair_score": tuple(round(0.01 * step - 0.2, 2) for step in range(121)),  # cosine of the run's scores
    "characters": tuple(range(1, 101)),
    "short_side_px": tuple(round(16 * 2 ** (step / 2)) for step in range(17)),  # 16 to 4096, each √2 wider
}


def histogram(name: str, kept: pl.Series, dropped: pl.Series) -> dict[str, list[int]]:
    """Return {"kept", "dropped"}: counts a bin, len(EDGES[name]) + 1 each, without nulls and NaN."""
    return {side: _count(name, values) for side, values in (("kept", kept), ("dropped", dropped))}


def add(histograms: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """Return the sum of some histograms of one name."""
    total: dict[str, list[int]] = {}
    for item in histograms:
        for side, counts in item.items():
            before = total.get(side, [0] * len(counts))
            total[side] = [a + b for a, b in zip(before, counts, strict=True)]
    return total


def of_stage(extras: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """Name → histogram of a finished stage, from what its tasks noted."""
    found: dict[str, list[Mapping[str, Sequence[int]]]] = {}
    for extra in extras:
        for name, counts in extra.get("histograms", {}).items():
            found.setdefault(name, []).append(counts)
    return {name: add(items) for name, items in found.items()}


def _count(name: str, values: pl.Series) -> list[int]:
    edges = np.asarray(EDGES[name], np.float64)
    numbers = values.cast(pl.Float64).drop_nulls().drop_nans().to_numpy()
    # Scores are float32: 0.26 as such is a little below 0.26 and belongs above the edge all the same.
    bins = np.searchsorted(edges, numbers + 1e-7, side="right")
    return np.bincount(bins, minlength=len(edges) + 1).tolist()  # type: ignore[no-any-return]
