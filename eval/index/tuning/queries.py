"""Chooses queries for tuning and measuring an index: the other side's features, or rows of the base.

Text queries lie outside the distribution of the images that they search, and an index needs more work to
answer them than to answer images. So if both sides were embedded, the other side asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.features.layout import EMBEDDING_FOLDERS, Side
from eval.features.model_identity import check_same_model
from eval.index.embeddings import Embeddings
from eval.index.formats.matrix import HDF5, is_vectors, suffix_of
from eval.index.metric import prepared
from eval.index.views import evenly_spaced, rows_without
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Int64Array
from pipeline.core.config import digest
from pipeline.core.records import ConfigError, InputError

_SIDES = ("image", "text", "held-out")
_SHARE_HELD_OUT = 10  # of so many rows one at most is held out, unless more are asked for


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries, and where they come from."""

    name: str  # image, text, held-out, or the name of a file
    source: str  # for people: which features
    vectors_QD: Float32Array
    rows_Q: Int64Array  # in their source
    are_own: bool = False  # rows of the base, which an index must not return for themselves

    def __len__(self) -> int:
        return len(self.vectors_QD)

    @property
    def digest(self) -> str:
        """Hash the vectors."""
        return digest([self.name, store.digest_bytes(self.vectors_QD.tobytes())])

    def part(self, start: int, step: int) -> "Queries":
        """Return every `step`-th query from `start`."""
        part = slice(start, None, step)
        return Queries(self.name, self.source, self.vectors_QD[part], self.rows_Q[part], self.are_own)


def other_of(side: Side) -> Side:
    """Return the side that asks a side."""
    return "text" if side == "image" else "image"


def other_side(path: str, side: Side) -> Side | None:
    """Return the side that asks an index of `side` of these features, or None if it was not embedded."""
    other = other_of(side)
    if is_vectors(path):
        return None
    names = store.list_files(store.join(path, EMBEDDING_FOLDERS[other]))
    return other if any(name.endswith(".npy") for name in names) else None


def has_test(path: str) -> bool:
    """Return whether a file of vectors has its own queries: the `test` of ann-benchmarks' HDF5 files."""
    return suffix_of(path) in HDF5


def queries_of_side(path: str, base: Embeddings, side: Side, count: int) -> Queries:
    """Return `count` evenly spaced features of the other side.

    Raises:
        InputError: if there are none, or they do not fit the base.
    """
    source = Embeddings.open(path, side=side, metric=base.asked_metric)
    rows_Q = evenly_spaced(count, source.num_rows)
    name = f"{len(rows_Q):,} {side} features of {path}"
    return _fitting(base, Queries(side, name, source.rows(rows_Q), rows_Q), path)


def queries_of_file(path: str, base: Embeddings, base_path: str, count: int) -> Queries:
    """Return `count` evenly spaced features of a file or folder.

    Raises:
        InputError: if they are of another model or do not fit the base.
    """
    source = Embeddings.open(path, metric=base.asked_metric, role="queries")
    check_same_model(base_path, base.model, source.model)
    rows_Q = evenly_spaced(count, source.num_rows)
    name = f"{len(rows_Q):,} features of {path}"
    return _fitting(base, Queries(path, name, source.rows(rows_Q), rows_Q), path)


def queries_of_array(vectors_QD: Float32Array, base: Embeddings) -> Queries:
    """Return queries from memory.

    Raises:
        InputError: if they are not unit-norm although the base is, or do not fit it.
    """
    vectors_QD = prepared(vectors_QD, base.metric, "queries", normalise=base.normalises)
    name = f"{len(vectors_QD):,} queries given"
    return _fitting(base, Queries("given", name, vectors_QD, np.arange(len(vectors_QD))), "queries")


def own_rows(base: Embeddings, count: int, keep: Sequence[Int64Array] = ()) -> Queries:
    """Return `count` evenly spaced rows of the base, or all if there are fewer; none of `keep`."""
    kept = np.unique(np.concatenate(keep)) if keep else np.zeros(0, dtype=np.int64)
    rows_Q = rows_without(kept, evenly_spaced(count, base.num_rows - len(kept)))
    vectors_QD = base.rows(rows_Q) if len(rows_Q) else np.zeros((0, base.dim), dtype=np.float32)
    return Queries("held-out", f"{len(rows_Q):,} rows of the index", vectors_QD, rows_Q, are_own=True)


def choose_queries(path: str, base: Embeddings, side: Side, count: int, file: str | None) -> Queries:
    """Return the queries that tune an index: a file's, else the other side's, else rows of the base."""
    if count < 2:
        raise ConfigError(
            f"--num-queries {count}: give at least 2, to tune on one half and measure on the other"
        )
    if file is not None or has_test(path):
        return queries_of_file(file or path, base, path, count)
    other = other_side(path, side)
    if other is not None:
        return queries_of_side(path, base, other, count)
    return own_rows(base, count)


def query_sets(
    path: str,
    base: Embeddings,
    side: Side,
    count: int,
    wanted: Sequence[str],
    file: str | None,
    keep: Sequence[Int64Array] = (),
) -> list[Queries]:
    """Return the sets of queries that measure an index.

    Args:
        path: the features.
        base: its indexed side.
        side: which that is.
        count: queries of each set at most.
        wanted: names of sides, or held-out (default: the other side if it was embedded, and held-out with a
            tenth of the rows at most, if `keep` leaves some).
        file: features to search for instead; an HDF5 file has its own, if no side is wanted.
        keep: rows of the base that no held-out set may take.

    Raises:
        ConfigError: for a side that was not embedded or is indexed itself.
        InputError: if there are too few rows to hold some out.
    """
    if count < 1:
        raise ConfigError(f"--num-queries {count}: give at least 1")
    if file is not None:
        if wanted:
            raise ConfigError("--queries and --query-side exclude each other")
        return [queries_of_file(file, base, path, count)]
    if has_test(path) and not wanted:
        return [queries_of_file(path, base, path, count)]
    other = other_side(path, side)
    num_held_out = count
    if not wanted:
        free = base.num_rows - (len(np.unique(np.concatenate(keep))) if keep else 0)
        num_held_out = min(count, free, base.num_rows // _SHARE_HELD_OUT)
        wanted = ([] if other is None else [other]) + (["held-out"] if num_held_out or other is None else [])
    found = []
    for name in dict.fromkeys(wanted):
        if name not in _SIDES:
            raise ConfigError(f"--query-side {name}: give one of {', '.join(_SIDES)}")
        if name == "held-out":
            found.append(own_rows(base, num_held_out, keep))
            if not 0 < len(found[-1]) == num_held_out < base.num_rows:
                raise InputError(
                    f"{base.paths[0]}: {base.num_rows} rows, too few to hold {num_held_out or count} out as"
                    " queries; give fewer (--num-queries), or --queries FILE"
                )
        elif name == side:
            raise ConfigError(
                f"--query-side {name}: the {name} features are the index, so each finds itself; use held-out"
            )
        elif other is None:
            raise ConfigError(f"--query-side {name}: {path} has no {EMBEDDING_FOLDERS[other_of(side)]}/")
        else:
            found.append(queries_of_side(path, base, other, count))
    return found


def _fitting(base: Embeddings, queries: Queries, path: str) -> Queries:
    if queries.vectors_QD.shape[1] != base.dim:
        raise InputError(
            f"{path}: queries of width {queries.vectors_QD.shape[1]} do not fit embeddings of width"
            f" {base.dim}: they belong to another model"
        )
    return queries
