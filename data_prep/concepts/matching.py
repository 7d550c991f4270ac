"""Finds the entries in captions, and draws which captions stay.

The published algorithm (MetaCLIP, Xu et al. 2024, algorithm 1) counts the captions of each entry, gives it
the probability min(1, cap / count), and keeps a caption if any of its entries is drawn. Here each draw is a
function of the seed, the row's key and the entry's text, so that it depends on no other row or entry.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import polars_hash as plh
import pyarrow as pa

from data_prep.concepts.entries import plain
from pipeline.core.shard_format import all_captions

_SEVERAL = all_captions("caption")
# A control character that captions do not have, so that no entry is found across two of them.
_BETWEEN = "\x1f"
_HEX_DIGITS = 16  # of a digest: 64 bits

UInt64Array = npt.NDArray[np.uint64]


def texts_of(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Return key and text of rows: a row that keeps several captions has the entries of all of them."""
    caption = pl.col("caption")
    if isinstance(rows.collect_schema().get(_SEVERAL), pl.List):
        several = pl.col(_SEVERAL).list
        caption = pl.when(several.len() > 0).then(several.join(_BETWEEN)).otherwise(caption)
    return rows.select("key", text=caption)


def match(texts: pl.Series, entries: pl.Series) -> pl.Series:
    """Return the numbers of the entries in each text, List(UInt32), each once and in order.

    `entries` are unique and as `plain` gives them. One call builds one automaton (two seconds for 500,000
    entries), so texts come in millions.
    """
    hits = (
        pl.DataFrame({"text": texts})
        .select(plain(pl.col("text")).str.extract_many(entries.implode(), overlapping=True))
        .with_row_index("at")
    )
    numbers = (
        hits.explode("text", empty_as_null=False)
        .select("at", entry=pl.col("text").cast(pl.Enum(entries)).to_physical().cast(pl.UInt32))
        .drop_nulls()
    )
    # One sort of (row, number) as one integer; np.unique takes a hundred times as long.
    pair_M = np.sort(numbers["at"].cast(pl.UInt64).to_numpy() << np.uint64(32) | numbers["entry"].to_numpy())
    pair_M = pair_M[np.diff(pair_M, prepend=~pair_M[:1]) != 0]
    return lists(
        (pair_M >> np.uint64(32)).astype(np.int64),
        pa.array((pair_M & np.uint64(0xFFFFFFFF)).astype(np.uint32)),
        len(texts),
    )


def lists(row_M: npt.NDArray[np.int64], value_M: Any, num_rows: int) -> pl.Series:
    """Return the values (an Arrow array) of each row as a list; `row_M` is sorted."""
    offset_N = np.searchsorted(row_M, np.arange(num_rows + 1))
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(offset_N, value_M)))


def counted(matches: pl.Series, num_entries: int) -> npt.NDArray[np.int64]:
    """Return the number of texts that have each entry, int64 [num_entries]."""
    numbers_M = matches.explode(empty_as_null=False).to_numpy()
    return np.bincount(numbers_M, minlength=num_entries).astype(np.int64)


def entry_seeds(entries: pl.Series) -> pl.Series:
    """Return 64 bits of each entry's digest, UInt64: its part of a draw."""
    digests = pl.DataFrame({"entry": entries}).select(plh.col("entry").chash.sha2_256())
    return digests.to_series().str.slice(0, _HEX_DIGITS).str.to_integer(base=16, dtype=pl.UInt64)


def key_seeds(keys: pl.Series) -> pl.Series:
    """Return the last 64 bits of each key, UInt64: its part of a draw."""
    return keys.str.slice(-_HEX_DIGITS).str.to_integer(base=16, dtype=pl.UInt64)


def draws(seed: int, key_M: UInt64Array, entry_M: UInt64Array) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for each pair of a row and an entry, which only depends on these three."""
    mixed_M = _mix(entry_M ^ _mix(key_M ^ _mix(np.full(1, seed, np.uint64))))
    numbers_M: npt.NDArray[np.float64] = (mixed_M >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers_M


def _mix(value_N: UInt64Array) -> UInt64Array:
    """SplitMix64 (Steele et al. 2014): every bit of the result depends on every bit of the value."""
    mixed: Any = value_N + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    result: UInt64Array = mixed ^ mixed >> np.uint64(31)
    return result


def balance(seed: int, rows: pl.DataFrame, counts: pl.DataFrame, cap: int) -> pl.DataFrame:
    """Judge rows with key and `concepts` (numbers of entries, List(UInt32)) in order.

    `counts` has entry, count and seed (`entry_seeds`) of each entry. Returns for each row is_kept,
    `concept_chance` (the chance of that over all seeds, Float32) and `rarest`, the number of its entry with
    the lowest count (null without one).
    """
    number_M = rows["concepts"].explode(empty_as_null=False).to_numpy()
    row_M = np.repeat(np.arange(rows.height), rows["concepts"].list.len().to_numpy())
    count_M = counts["count"].to_numpy()[number_M]
    chance_M = np.minimum(1.0, cap / np.maximum(count_M, 1))
    key_M = key_seeds(rows["key"]).to_numpy()[row_M]
    is_drawn_M = draws(seed, key_M, counts["seed"].to_numpy()[number_M]) < chance_M
    with np.errstate(divide="ignore"):  # log of 0 for an entry that is always drawn
        missed_N = np.bincount(row_M, np.log1p(-chance_M), minlength=rows.height)
    by_count = np.lexsort((number_M, count_M, row_M))
    first = np.flatnonzero(np.diff(row_M[by_count], prepend=-1))
    rarest = pl.DataFrame({"at": row_M[by_count][first], "rarest": number_M[by_count][first]})
    judged = pl.DataFrame(
        {
            "at": np.arange(rows.height),
            "is_kept": np.bincount(row_M[is_drawn_M], minlength=rows.height) > 0,
            "concept_chance": pl.Series(-np.expm1(missed_N), dtype=pl.Float32),
        }
    )
    return judged.join(rarest, on="at", how="left", maintain_order="left").drop("at")
