"""Views of features: without some rows, or with a vector subtracted from each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from eval.index.metric import Metric
from pipeline.core.arrays import Float32Array, Int64Array


class Vectors(Protocol):
    """Rows that are read a block at a time; `eval.index.embeddings.Embeddings` or a view of them."""

    @property
    def paths(self) -> tuple[str, ...]: ...

    @property
    def dim(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def metric(self) -> Metric: ...

    def blocks(self, start: int, stop: int) -> Iterator[Float32Array]:
        """Yield rows start … stop - 1 in order, float32 [rows, dim]."""
        ...

    def rows(self, wanted: Int64Array) -> Float32Array:
        """Return these rows, which are ascending, float32 [len(wanted), dim]."""
        ...


def evenly_spaced(count: int, num_rows: int) -> Int64Array:
    """Return `count` ascending rows of `num_rows`, or all if there are fewer."""
    count = min(count, num_rows)
    return np.arange(count, dtype=np.int64) * num_rows // count


def rows_without(left_out: Int64Array, numbers: Int64Array) -> Int64Array:
    """Return the rows with these numbers if rows are counted without `left_out`, ascending and distinct."""
    before = left_out - np.arange(len(left_out))  # counted rows before each that is left out
    rows: Int64Array = numbers + np.searchsorted(before, numbers, side="right")
    return rows


@dataclass(frozen=True, slots=True)
class Without:
    """All rows but some, which are queries and must not be answers; the others move up."""

    base: Vectors
    held_out: Int64Array  # ascending, distinct

    @property
    def paths(self) -> tuple[str, ...]:
        return self.base.paths

    @property
    def dim(self) -> int:
        return self.base.dim

    @property
    def metric(self) -> Metric:
        return self.base.metric

    @property
    def num_rows(self) -> int:
        return self.base.num_rows - len(self.held_out)

    def blocks(self, start: int, stop: int) -> Iterator[Float32Array]:
        if start >= stop:
            return
        first, last = self._in_base(np.array([start, stop - 1], dtype=np.int64)).tolist()
        row = first
        for block_BD in self.base.blocks(first, last + 1):
            low, high = np.searchsorted(self.held_out, [row, row + len(block_BD)])
            kept_BD = np.delete(block_BD, self.held_out[low:high] - row, axis=0)
            row += len(block_BD)
            if len(kept_BD):
                yield kept_BD

    def rows(self, wanted: Int64Array) -> Float32Array:
        return self.base.rows(self._in_base(wanted))

    def moved(self, rows_of_base: Int64Array) -> Int64Array:
        """Return where rows of the base are in this view; none of them may be held out."""
        moved: Int64Array = rows_of_base - np.searchsorted(self.held_out, rows_of_base)
        return moved

    def _in_base(self, rows: Int64Array) -> Int64Array:
        return rows_without(self.held_out, rows)


def view_of(base: Vectors, held_out: Int64Array | None) -> Vectors:
    """Return the rows that are indexed: all but those held out."""
    return base if held_out is None else Without(base, held_out)


@dataclass(frozen=True, slots=True)
class Centred:
    """Rows with their mean subtracted.

    The product of a query with a row falls by the same number for every row, so the ranks stay, and codes
    spend no bits on what all rows share.
    """

    base: Vectors
    mean_D: Float32Array

    @property
    def paths(self) -> tuple[str, ...]:
        return self.base.paths

    @property
    def dim(self) -> int:
        return self.base.dim

    @property
    def metric(self) -> Metric:
        return self.base.metric

    @property
    def num_rows(self) -> int:
        return self.base.num_rows

    def blocks(self, start: int, stop: int) -> Iterator[Float32Array]:
        for block_BD in self.base.blocks(start, stop):
            block_BD -= self.mean_D
            yield block_BD

    def rows(self, wanted: Int64Array) -> Float32Array:
        return self.base.rows(wanted) - self.mean_D


def mean_of(vectors: Vectors, most_rows: int) -> Float32Array:
    """Return the mean of at most `most_rows` evenly spaced rows, float32 [dim]."""
    sample_ND = vectors.rows(evenly_spaced(most_rows, vectors.num_rows))
    mean_D: Float32Array = sample_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean_D
