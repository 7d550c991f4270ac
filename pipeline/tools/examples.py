"""`cnclip status --examples`: shows rows that were dropped for a reason, with their captions.

Receipts show which drop tables contain the reason; only the requested number of rows is read from these.
Their captions, addresses and scores are in the caption tables, which are streamed until all are found.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import polars as pl

from data_prep.accounting.drop_table import DETAIL, HTTP_STATUS
from data_prep.accounting.funnel import STEPS
from data_prep.filters.text import FilterTextConfig
from pipeline.core import store
from pipeline.core.records import Receipt
from pipeline.core.run import Run, read_manifest
from pipeline.tools.why import rows_of_tables

STAGES = ("corpus", *STEPS)


@dataclass(frozen=True, slots=True)
class Example:
    """One dropped row.

    Unknown fields are None: a malformed row has only its text.
    """

    stage: str
    reason: str
    key: str | None
    source: str | None
    url: str | None
    caption: str | None
    score: float | None
    detail: str | None  # the word of a blacklist, an HTTP status, the key of a copy's original
    text: str | None  # a malformed row as it was read


def is_named(reason: str, name: str) -> bool:
    """Return whether a name denotes a reason: the reason itself, or the part before its colon."""
    return reason == name or reason.startswith(f"{name}:")


def examples(
    run: Run,
    config: FilterTextConfig,
    receipts: Sequence[tuple[str, Sequence[Receipt]]],
    name: str,
    count: int,
) -> list[Example]:
    """Return at most `count` rows that were dropped for a reason, in the order of stages and tasks.

    `receipts` are those of the stages, by name.
    """
    found = list(itertools.islice(_dropped(run, receipts, name, count), count))
    corpus = read_manifest(run, "corpus")
    wanted = {example.key for example in found if example.key is not None}
    if corpus is None or not wanted:
        return found
    rows: dict[str, dict[str, object]] = {}
    for frame in rows_of_tables(run, corpus, config, pl.col("key").is_in(list(wanted))):
        for row in frame.iter_rows(named=True):
            rows.setdefault(row["key"], row)
        if len(rows) == len(wanted):
            break
    return [_described(example, rows.get(example.key or "")) for example in found]


def _described(example: Example, row: dict[str, object] | None) -> Example:
    if row is None:
        return example
    fields = {name: row[name] for name in ("source", "url", "caption", "score")}
    return replace(example, **fields)  # type: ignore[arg-type]  # polars gives the columns' types


def _dropped(
    run: Run, receipts: Sequence[tuple[str, Sequence[Receipt]]], name: str, count: int
) -> Iterator[Example]:
    for stage, of_stage in receipts:
        for receipt in of_stage:
            if not any(is_named(reason, name) for reason in receipt.dropped):
                continue
            for output in receipt.outputs:
                if output.num_samples and output.path.startswith(("dropped/", "malformed/")):
                    yield from _of_table(store.join(run.folder, stage, output.path), stage, name, count)


def _of_table(path: str, stage: str, name: str, count: int) -> Iterator[Example]:
    table = pl.scan_parquet(path)
    columns = table.collect_schema().names()
    reason = pl.col("reason")
    asked = table.filter((reason == name) | reason.str.starts_with(f"{name}:"))
    further = [column for column in ("key", DETAIL, HTTP_STATUS, "text") if column in columns]
    for row in asked.select("reason", *further).head(count).collect(engine="streaming").iter_rows(named=True):
        detail = row.get(DETAIL) or row.get(HTTP_STATUS)
        yield Example(
            stage=stage,
            reason=row["reason"],
            key=row.get("key"),
            source=None,
            url=None,
            caption=None,
            score=None,
            detail=None if detail is None else str(detail),
            text=row.get("text"),
        )
