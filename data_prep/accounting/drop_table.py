"""Drop tables: for every dropped row its key, the digest of its URL, the reason, and some with a detail.

They answer `cnclip why`; everything else about a row is looked up in its source. `detail` is the word of a
blacklist, the key of the image that a copy is of, or the key of the text that a caption became part of; a
stage whose rows say enough has no such column.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator

import polars as pl

from data_prep.formats.keys import url_hash, with_key
from data_prep.formats.parquet import write_table
from pipeline.core.files.written import ParquetRows, parquet_rows

DETAIL = "detail"  # the word of a blacklist, the key that a copy or a caption belongs to
HTTP_STATUS = "http_status"  # of the answer, if there was one: only in the download's drop tables


def write_drops(dropped: pl.DataFrame, path: str) -> dict[str, int]:
    """Publish the drop table of a frame with url, key and reason; returns rows per reason.

    If the frame has a column http_status or detail, the table has it too.
    """
    further = [name for name in (HTTP_STATUS, DETAIL) if name in dropped.columns]
    write_table(_as_drops(dropped, further), path)
    counts = dropped.group_by("reason").len().sort("reason")
    return dict(counts.iter_rows())


def _as_drops(dropped: pl.DataFrame, further: list[str]) -> pl.DataFrame:
    table = dropped.with_columns(url=pl.col("url").fill_null("")).select(
        "key", url_hash().alias("url_hash"), "reason", *further
    )
    return table.sort("url_hash", "key", "reason")


class DropsAsTheyCome:
    """A drop table with details, written block by block; without rows it writes no file."""

    def __init__(self, path: str, stack: contextlib.ExitStack) -> None:
        self.counts: Counter[str] = Counter()
        self._path = path
        self._stack = stack
        self._writer: ParquetRows | None = None

    def add(self, rows: pl.DataFrame, reason: str, detail: pl.Expr | None = None) -> None:
        """Note rows with url and caption.

        The keys are plain ones, without a run's normalisation.
        """
        if rows.is_empty():
            return
        self.counts[str(reason)] += rows.height
        marked = with_key(rows.lazy()).with_columns(
            pl.lit(str(reason)).alias("reason"),
            pl.lit(None, pl.String).alias(DETAIL) if detail is None else detail,
        )
        table = _as_drops(marked.collect(), [DETAIL]).to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            self._writer = self._stack.enter_context(parquet_rows(self._path, table.schema))
        self._writer.write_table(table)


@contextlib.contextmanager
def drops_as_they_come(path: str) -> Iterator[DropsAsTheyCome]:
    """Publish a drop table of the rows that are added while the block runs; memory is that of a block."""
    with contextlib.ExitStack() as stack:
        yield DropsAsTheyCome(path, stack)


def drops_path(task: str) -> str:
    """Return where a task keeps its drop table, relative to its stage's folder."""
    return os.path.join("dropped", f"{task}.parquet")
