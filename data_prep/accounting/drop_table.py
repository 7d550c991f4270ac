"""Drop tables: for every dropped row its key, the digest of its URL, the reason, and some with a detail.

They answer `cnclip why`; everything else about a row is looked up in its source. `detail` is the word of a
blacklist, the key of the picture that a copy is of, or the key of the text that a caption became part of; a
stage whose rows say enough has no such column.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl
import polars_hash as plh

from pipeline.core import store
from pipeline.core.stage import Context, Outcome, Task

DROP_COLUMNS = {"key": pl.String, "url_hash": pl.String, "reason": pl.String}
DETAIL = "detail"  # the word of a blacklist, the key that a copy or a caption belongs to
HTTP_STATUS = "http_status"  # of the answer, where there was one: the download's drop tables alone
_KEY_HEX_DIGITS = 32  # 128 bits: no collision to be expected among billions of rows
_URL_HASH_HEX_DIGITS = 16
_SEPARATOR = "\u0000"
_ROWS_PER_GROUP = 65_536


def with_key(frame: pl.LazyFrame, normalise: bool = False) -> pl.LazyFrame:
    """Add the column `key` to a table with url and caption: the start of the sha256 of both, 32 hex digits.

    Sorting by it shuffles the corpus once, the same way on any number of machines, and brings exact
    duplicates together; with `normalise` also pairs that differ only in the caption's width, case, white
    space and punctuation or in the address's scheme and fragment.
    """
    url, caption = pl.col("url").fill_null(""), pl.col("caption").fill_null("")
    if normalise:
        url = url.str.replace(r"^(?i)https?://(www\.)?", "").str.replace(r"#.*$", "")
        plain = caption.str.normalize("NFKC").str.to_lowercase().str.replace_all(r"[\p{P}\p{Z}\p{C}]", "")
        caption = pl.when(plain == "").then(caption).otherwise(plain)  # "！！" and "？？" stay two captions
    pair = pl.concat_str([url, caption], separator=_SEPARATOR)
    return (
        frame.with_columns(_pair=pair)
        .with_columns(key=plh.col("_pair").chash.sha2_256().str.slice(0, _KEY_HEX_DIGITS))
        .drop("_pair")
    )


def url_hash(name: str = "url") -> pl.Expr:
    """Digest of a URL as drop tables keep it, 16 hex digits."""
    hashed: pl.Expr = plh.col(name).chash.sha2_256().str.slice(0, _URL_HASH_HEX_DIGITS)
    return hashed


def write_table(frame: pl.DataFrame, path: str, rows_per_group: int = _ROWS_PER_GROUP) -> None:
    """Publish a table as Parquet; the same rows give the same bytes."""
    with store.publish(path) as temporary:
        try:
            frame.write_parquet(temporary, compression="zstd", statistics=True, row_group_size=rows_per_group)
        except pl.exceptions.PolarsError as error:  # it wraps what the system says, a full disk for one
            if found := re.search(r"os error (\d+)", str(error)):
                number = int(found[1])
                raise OSError(number, os.strerror(number), path) from None
            raise


def write_drops(dropped: pl.DataFrame, path: str) -> dict[str, int]:
    """Publish the drop table of a frame with url, key and reason; returns rows per reason.

    Where the frame has a column http_status or detail, the table has it too.
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
    """A drop table with details, written block by block; without a row there is no file."""

    def __init__(self, path: str, stack: contextlib.ExitStack) -> None:
        self.counts: Counter[str] = Counter()
        self._path = path
        self._stack = stack
        self._writer: Any = None

    def add(self, rows: pl.DataFrame, reason: str, detail: pl.Expr | None = None) -> None:
        """Note rows with url and caption. Their keys are the plain ones, whatever a run normalises later."""
        if rows.is_empty():
            return
        import pyarrow.parquet as pq

        self.counts[str(reason)] += rows.height
        marked = with_key(rows.lazy()).with_columns(
            pl.lit(str(reason)).alias("reason"),
            pl.lit(None, pl.String).alias(DETAIL) if detail is None else detail,
        )
        table = _as_drops(marked.collect(), [DETAIL]).to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            temporary = self._stack.enter_context(store.publish(self._path))
            self._writer = self._stack.enter_context(
                pq.ParquetWriter(temporary, table.schema, compression="zstd")
            )
        self._writer.write_table(table)


@contextlib.contextmanager
def drops_as_they_come(path: str) -> Iterator[DropsAsTheyCome]:
    """Publish a drop table of the rows that are added while the block runs; memory is that of a block."""
    with contextlib.ExitStack() as stack:
        yield DropsAsTheyCome(path, stack)


def publish_judged(
    context: Context,
    task: Task,
    kept: pl.DataFrame,
    dropped: pl.DataFrame,
    extra: Mapping[str, Any] | None = None,
    pieces: Mapping[str, pl.DataFrame] | None = None,
    rows_per_group: int = _ROWS_PER_GROUP,
) -> Outcome:
    """Publish a task's kept rows and its drops (with url, key and reason), and account for both.

    `pieces` is the kept rows cut into several files, by name; without it they are one, named as the task.
    `rows_per_group` is for tables of which others read a range.
    """
    by_source = {"sources": count_by_source(kept, dropped)}
    outputs = {}
    for name, piece in (pieces or {task.name: kept}).items():
        write_table(piece, context.path(f"kept/{name}.parquet"), rows_per_group)
        outputs[f"kept/{name}.parquet"] = piece.height
    counts = write_drops(dropped, context.path(drops_path(task.name)))
    return Outcome(
        {**outputs, drops_path(task.name): dropped.height},
        num_in=kept.height + dropped.height,
        num_kept=kept.height,
        dropped=counts,
        extra={**(extra or {}), **by_source},
    )


def count_by_source(kept: pl.DataFrame, dropped: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """Rows in, kept and dropped by reason, of each source: the receipt's part of the funnel."""
    num_kept = dict(kept.group_by("source").len().iter_rows())
    drops: dict[str, dict[str, int]] = {}
    for source, reason, count in (
        dropped.group_by("source", "reason").len().sort("source", "reason").iter_rows()
    ):
        drops.setdefault(source, {})[reason] = count
    return {
        source: {
            "in": num_kept.get(source, 0) + sum(drops.get(source, {}).values()),
            "kept": num_kept.get(source, 0),
            "dropped": drops.get(source, {}),
        }
        for source in sorted({*num_kept, *drops})
    }


def drops_path(task: str) -> str:
    """Where a task keeps its drop table, relative to its stage's folder."""
    return os.path.join("dropped", f"{task}.parquet")
