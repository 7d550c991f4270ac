"""Finds the first word list with a word inside a caption; the number of words chooses the matcher.

For a handful of words, it is polars' Aho-Corasick. For more, it is Hyperscan, if installed, over the whole
column's bytes at once; it needs half of the CPU time from 10 words on and less beyond, because the automaton
of thousands of words does not fit into the CPU's caches (benchmarks/data_prep/filter_text.py has both).
Both give the same results: they compare bytes, and treat A to Z like a to z.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

# Above this, one pass of Hyperscan is quicker than polars' automaton.
HYPERSCAN_FROM_WORDS = 10
_MAX_BYTES_AT_ONCE = 1 << 30  # Hyperscan counts offsets of a block in 32 bits
_NONE = np.iinfo(np.uint32).max

Words = tuple[str, ...]


def first_list(captions: pl.Expr, lists: Sequence[Sequence[str]]) -> pl.Expr:
    """Return the number (UInt32) of the first list with a word inside the caption, or null."""
    words = tuple(tuple(words) for words in lists)
    if sum(map(len, words)) > HYPERSCAN_FROM_WORDS and has_hyperscan():
        return captions.map_batches(
            functools.partial(_scan, lists=words), return_dtype=pl.UInt32, is_elementwise=True
        )
    hits = [
        pl.when(captions.str.contains_any(list(one), ascii_case_insensitive=True)).then(
            pl.lit(number, dtype=pl.UInt32)
        )
        for number, one in enumerate(words)
        if one
    ]
    return pl.coalesce(hits) if hits else pl.lit(None, dtype=pl.UInt32)


def first_word(captions: pl.Series, words: Sequence[str]) -> pl.Series:
    """Return for each caption the list's first word inside it, or null."""
    # Parts of a caption that equal words up to the case of A to Z have the words' lower case.
    known = (
        pl.DataFrame({"word": list(words)})
        .with_row_index("place")
        .with_columns(part=pl.col("word").str.to_lowercase())
    )
    hits = (
        pl.DataFrame({"caption": captions})
        .with_row_index("at")
        .select(
            "at",
            part=pl.col("caption")
            .str.extract_many(list(words), ascii_case_insensitive=True, overlapping=True)
            .list.eval(pl.element().str.to_lowercase()),
        )
    )
    found = hits.explode("part").join(known, on="part")
    first = found.group_by("at").agg(pl.col("word").sort_by("place").first())
    return hits.select("at").join(first, on="at", how="left", maintain_order="left")["word"]


@functools.cache
def has_hyperscan() -> bool:
    try:
        import hyperscan  # noqa: F401
    except ImportError:
        return False
    return True


class _Database:
    """Compiled words of some lists.

    Each thread has its own scratch space, because the engine calls from several threads.
    """

    def __init__(self, lists: tuple[Words, ...]) -> None:
        import hyperscan

        # A word in two lists counts for the first.
        number: dict[bytes, int] = {}
        for at, words in enumerate(lists):
            for word in words:
                number.setdefault(_folded(word), at)
        expressions = list(number)
        self.list_W = np.array([number[word] for word in expressions], np.uint32)
        self.num_bytes_W = np.array([len(word) for word in expressions], np.int64)
        self._database: Any = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
        self._database.compile(
            expressions=expressions,
            ids=list(range(len(expressions))),
            elements=len(expressions),
            flags=[hyperscan.HS_FLAG_CASELESS] * len(expressions),
            literal=True,
        )
        self._local = threading.local()

    def ends(self, data: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (word, end offset) of every hit, int64 each."""
        import hyperscan

        if not hasattr(self._local, "scratch"):
            self._local.scratch = hyperscan.Scratch(self._database)
        words: list[int] = []
        ends: list[int] = []
        add_word, add_end = words.append, ends.append

        def note(word: int, start: int, end: int, flags: int, context: object) -> None:
            add_word(word)
            add_end(end)

        self._database.scan(data, match_event_handler=note, scratch=self._local.scratch)
        return np.array(words, np.int64), np.array(ends, np.int64)


@functools.lru_cache(maxsize=4)
def _database(lists: tuple[Words, ...]) -> _Database:
    return _Database(lists)


def _folded(word: str) -> bytes:
    return word.encode("utf-8").lower()  # bytes.lower() touches only A to Z


def _scan(captions: pl.Series, lists: tuple[Words, ...]) -> pl.Series:
    table: Any = captions.to_arrow()
    column = table.cast(pa.large_string())
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    found = [_scan_array(chunk, _database(lists)) for chunk in chunks]
    numbers = np.concatenate(found) if found else np.empty(0, np.uint32)
    result = pl.Series(captions.name, numbers, dtype=pl.UInt32)
    return result.set(result == _NONE, None)


def _scan_array(column: Any, database: _Database) -> npt.NDArray[np.uint32]:
    """Return the number of the first matching list for each row of a large_string array, or _NONE."""
    number_N = np.full(len(column), _NONE, np.uint32)
    offset_N = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    data = column.buffers()[2]
    first = 0
    while data is not None and first < len(column):
        limit = int(offset_N[first]) + _MAX_BYTES_AT_ONCE
        end = max(first + 1, int(np.searchsorted(offset_N, limit, side="right")) - 1)
        begin = int(offset_N[first])
        word_M, end_M = database.ends(memoryview(data)[begin : int(offset_N[end])].tobytes())
        start_M = end_M + begin - database.num_bytes_W[word_M]
        row_M = np.searchsorted(offset_N, start_M, side="right") - 1
        inside = offset_N[row_M + 1] >= end_M + begin  # a word across two rows belongs to neither
        np.minimum.at(number_N, row_M[inside], database.list_W[word_M[inside]])
        first = end
    return number_N
