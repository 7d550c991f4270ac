"""Further passes of the download: decides which failures are worth retrying, and merges the results.

A pass is another download stage (`download/retry1`, `retry2`, …) over the rows that an earlier pass gave up
on. Merging it gives each partition a new receipt: the old images, the newly downloaded ones, one table of
both in key order, and the remaining drops. So each row is counted once, and later stages see the corpus that
a better first pass would have given.
"""

import collections
import concurrent.futures
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import polars as pl

from data_prep.accounting.drop_table import HTTP_STATUS
from data_prep.accounting.judged import SourceCounts, sources_from_json
from data_prep.download.reasons import HTTP_ERROR, PASSING, PASSING_STATUSES, SERVER_ERRORS_FROM
from data_prep.formats.parquet import write_table
from pipeline.core import store
from pipeline.core.facts import Facts
from pipeline.core.records import Manifest, Receipt, Shard
from pipeline.core.stage import Context, Task

_READERS = 32  # drop tables read at once: a store answers each after some 20 ms


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadTask(Facts):
    """The rows of a partition; in a later pass, the drop table that says which of them to ask for again."""

    path: str  # in the folder of stage dedup
    drops: str | None = None  # in the folder of stage download


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCounts(Facts):
    """Rows that a further pass requested, and rows that it downloaded."""

    asked: int
    recovered: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadFacts(Facts):
    """The facts of one partition's download."""

    sources: Mapping[str, SourceCounts]
    passes: Mapping[str, PassCounts] | None = None  # number of a further pass → its rows

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        passes = {number: PassCounts.from_json(counts) for number, counts in fields.get("passes", {}).items()}
        return cls(sources=sources_from_json(fields), passes=passes or None)


@dataclass(frozen=True, slots=True)
class Failures:
    """Failed rows of one class (`http_error 503`), and whether they are worth retrying."""

    name: str
    num_rows: int
    is_worth_it: bool


def worth_it(drops: pl.LazyFrame) -> pl.LazyFrame:
    """Return the rows of a download's drop table that are worth retrying."""
    if HTTP_STATUS not in drops.collect_schema().names():
        drops = drops.with_columns(pl.lit(None, dtype=pl.Int16).alias(HTTP_STATUS))
    status = pl.col(HTTP_STATUS)
    passing = status.is_in(PASSING_STATUSES) | (status >= SERVER_ERRORS_FROM)
    of_server = (pl.col("reason") == str(HTTP_ERROR)) & passing.fill_null(
        True
    )  # unknown: made before it was kept
    return drops.filter(pl.col("reason").is_in([str(reason) for reason in PASSING]) | of_server)


def failures(context: Context) -> list[Failures]:
    """Return what the download gave up on, by class, the largest first."""
    paths = [
        context.path_in("download", drops.path)
        for drops in _drop_tables(context).values()
        if drops.num_samples
    ]
    counts: collections.Counter[tuple[str, bool]] = collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for of_table in pool.map(_classes, paths):
            counts.update(of_table)
    return [
        Failures(name, count, again)
        for (name, again), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _classes(path: str) -> dict[tuple[str, bool], int]:
    """Return (class, whether it is worth another try) → rows of a drop table."""
    table = pl.scan_parquet(path)
    again = worth_it(table).select("key", again=pl.lit(True))
    shown = [pl.col("reason")]
    if HTTP_STATUS in table.collect_schema().names():
        shown.append(pl.when(pl.col("reason") == str(HTTP_ERROR)).then(pl.col(HTTP_STATUS).cast(pl.String)))
    name = pl.concat_str(shown, separator=" ", ignore_nulls=True)
    rows = table.join(again, on="key", how="left").select(name=name, again=pl.col("again").fill_null(False))
    return {
        (name, again): count
        for name, again, count in rows.group_by("name", "again").len().collect().iter_rows()
    }


def plan(config: Any, context: Context) -> list[Task]:
    """Return one task for each partition that has rows worth retrying.

    The reasons in the manifest decide; only what a status decides is looked up in drop tables.
    """
    rows = {shard.path: shard for shard in context.parents["dedup"].shards if shard.path.startswith("kept/")}
    extra = context.parents["download"].extra
    is_worth: dict[str, bool] = {}
    unclear: dict[str, str] = {}
    tables = {name: drops for name, drops in _drop_tables(context).items() if drops.num_samples}
    for name, drops in tables.items():
        sources = DownloadFacts.from_json(extra[name]).sources.values()
        reasons = {reason for counts in sources for reason, count in counts.dropped.items() if count}
        is_worth[name] = not reasons.isdisjoint(PASSING)
        if not is_worth[name] and HTTP_ERROR in reasons:
            unclear[name] = context.path_in("download", drops.path)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        is_worth |= zip(unclear, pool.map(_has_worth, unclear.values()), strict=True)
    tasks = []
    for name, drops in tables.items():
        if is_worth[name]:
            path = f"kept/{name}.parquet"
            inputs = {"rows": rows[path].digest, "drops": drops.digest}
            tasks.append(Task(name, inputs, DownloadTask(path=path, drops=drops.path).to_json()))
    return tasks


def _has_worth(path: str) -> bool:
    return bool(worth_it(pl.scan_parquet(path)).select(pl.len()).collect().item())


def next_pass(download: Manifest) -> int:
    """Return the number of the next pass to merge; 1 after the first download."""
    merged = [
        number for extra in download.extra.values() for number in DownloadFacts.from_json(extra).passes or {}
    ]
    return 1 + max(map(int, merged), default=0)


def is_merged(receipt: Receipt, number: int) -> bool:
    """Return whether a partition's receipt has a pass already, because a merge was killed."""
    return str(number) in (DownloadFacts.from_json(receipt.extra).passes or {})


def merge(context: Context, number: int, before: Receipt, came: Receipt) -> Receipt:
    """Return the download's receipt of a partition after a pass, which came to `came`.

    New files go next to the old ones; files that the download's manifest names stay untouched.
    """
    folder = f"retry{number}"
    outputs = {output.path: output for output in before.outputs}
    came_outputs = {output.path: output for output in came.outputs}
    table_path, drops_path = _table_of(before), _drops_of(before)
    came_table, came_drops = (
        context.path_in("download", folder, path) for path in (_table_of(came), _drops_of(came))
    )
    old_drops = pl.read_parquet(context.path_in("download", drops_path))
    asked = worth_it(old_drops.lazy()).collect()
    left = pl.concat(
        [old_drops.join(asked, on="key", how="anti"), pl.read_parquet(came_drops)], how="diagonal"
    )
    new_drops = f"dropped/{before.task}.{folder}.parquet"
    write_table(left.sort("url_hash", "key", "reason"), context.path_in("download", new_drops))
    written = {new_drops: left.height}
    tars = [path for path in outputs if path.endswith(".tar")]
    kept = [outputs[path] for path in tars]
    if came.num_kept:
        first = pl.read_parquet(context.path_in("download", table_path))
        if "tar" not in first.columns:
            first = first.with_columns(tar=pl.lit(tars[0]))
        tar = next(path for path in came_outputs if path.endswith(".tar"))
        second = pl.read_parquet(came_table).with_columns(tar=pl.lit(f"{folder}/{tar}"))
        merged = pl.concat([first, second], how="diagonal_relaxed").sort("key")
        new_table = f"pictures/{before.task}.{folder}.parquet"
        write_table(merged, context.path_in("download", new_table))
        written[new_table] = merged.height
        found = came_outputs[tar]
        kept.append(Shard(f"{folder}/{tar}", found.num_samples, found.num_bytes, found.digest))
    else:
        kept.append(outputs[table_path])
    for path, num_samples in written.items():
        full = context.path_in("download", path)
        kept.append(Shard(path, num_samples, store.num_bytes(full), store.digest_file(full)))
    rows = pl.scan_parquet(context.path_in("dedup", f"kept/{before.task}.parquet")).select("key", "source")
    sources = rows.collect().join(asked, on="key").group_by("source", "reason").len()
    facts, came_facts = DownloadFacts.from_json(before.extra), DownloadFacts.from_json(came.extra)
    this_pass = PassCounts(asked=came.num_in, recovered=came.num_kept)
    return Receipt(
        stage=before.stage,
        task=before.task,
        inputs_digest=before.inputs_digest,
        config_digest=before.config_digest,
        outputs=tuple(kept),
        num_in=before.num_in,
        num_kept=before.num_kept + came.num_kept,
        dropped=dict(left.group_by("reason").len().sort("reason").iter_rows()),
        seconds=round(before.seconds + came.seconds, 3),
        extra=DownloadFacts(
            sources=_sources(facts.sources, sources, came_facts.sources),
            passes={**(facts.passes or {}), str(number): this_pass},
        ).to_json(),
    )


def unused_files(context: Context, download: Manifest) -> Iterator[str]:
    """Return tables of the download that its manifest no longer names because a merge replaced them."""
    named = {shard.path for shard in download.shards}
    for folder in ("pictures", "dropped"):
        for name in store.list_files(context.path_in("download", folder)):
            if name.endswith(".parquet") and f"{folder}/{name}" not in named:
                yield context.path_in("download", folder, name)


def _sources(
    before: Mapping[str, SourceCounts], asked: pl.DataFrame, came: Mapping[str, SourceCounts]
) -> dict[str, SourceCounts]:
    """Return the funnel by source, in which the results of retried rows replace their old ones."""
    num_kept = {source: counts.num_kept for source, counts in before.items()}
    dropped = {source: dict(counts.dropped) for source, counts in before.items()}
    for source, reason, count in asked.iter_rows():
        dropped[source][reason] -= count
    for source, counts in came.items():
        num_kept[source] += counts.num_kept
        for reason, count in counts.dropped.items():
            dropped[source][reason] = dropped[source].get(reason, 0) + count
    return {
        source: SourceCounts(
            num_in=counts.num_in,
            num_kept=num_kept[source],
            dropped={reason: count for reason, count in sorted(dropped[source].items()) if count},
        )
        for source, counts in before.items()
    }


def _drop_tables(context: Context) -> dict[str, Shard]:
    """Return partition → its drop table, of the finished download."""
    return {
        shard.path.removeprefix("dropped/").partition(".")[0]: shard
        for shard in context.parents["download"].shards
        if shard.path.startswith("dropped/")
    }


def _table_of(receipt: Receipt) -> str:
    return next(
        o.path for o in receipt.outputs if o.path.startswith("pictures/") and o.path.endswith(".parquet")
    )


def _drops_of(receipt: Receipt) -> str:
    return next(output.path for output in receipt.outputs if output.path.startswith("dropped/"))
