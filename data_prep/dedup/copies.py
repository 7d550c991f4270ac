"""Two stages that drop the rows that others have found to be copies: of images, or of their meaning.

Whoever finds copies writes `copies/*.parquet` (key, reason, detail) sorted by key, with keys from anywhere in
the corpus. The first stage here sorts these by the tables of rows that they are in; the second drops them.
"""

import functools
from dataclasses import dataclass
from typing import Any

import polars as pl

from data_prep.accounting.judged import publish_judged
from data_prep.corpus_facts import (
    NeighboursTask,
    is_exempt,
    kept_tables,
    neighbours,
    rows_stage,
    table_name,
)
from data_prep.formats.parquet import write_table
from pipeline.core.facts import Facts
from pipeline.core.records import Shard
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

COPIES_SCHEMA = {"key": pl.String, "reason": pl.String, "detail": pl.String}

_ROWS_MERGED = 1_000_000  # of neighbouring tables, whose copies are in one file
_ROWS_PER_GROUP = 4_096  # of that file: each table of rows reads a range


@dataclass(frozen=True, slots=True, kw_only=True)
class DropTask(Facts):
    """A table of rows, and the file with its copies: their paths in the folders of their stages."""

    table: str
    copies: str


def _groups(context: Context) -> list[list[Shard]]:
    return neighbours(kept_tables(context, rows_stage(context)), _ROWS_MERGED)


def _merged_path(group: list[Shard]) -> str:
    return f"copies/{table_name(group[0])}.parquet"


def plan_merge(config: Any, context: Context, finder: str) -> list[Task]:
    """Plan one task for neighbouring tables of a million rows, bound to all copies that were found."""
    found = {shard.path: shard.digest for shard in context.parents[finder].shards}
    return [
        Task(
            table_name(group[0]),
            {**{shard.path: shard.digest for shard in group}, **found},
            NeighboursTask(tables=[shard.path for shard in group]).to_json(),
        )
        for group in _groups(context)
    ]


def run_merge(config: Any, context: Context, task: Task, progress: Progress, finder: str) -> Outcome:
    """Write `copies/<task>.parquet`: the copies among some tables' rows; exact copies take precedence."""
    tables = NeighboursTask.from_json(task.arguments).tables
    stage = rows_stage(context)
    keys = pl.concat([pl.scan_parquet(context.path_in(stage, table)).select("key") for table in tables])
    first, last, num_rows = keys.select(
        pl.col("key").min().alias("first"), pl.col("key").max().alias("last"), pl.len().alias("rows")
    ).collect().row(0)  # fmt: skip
    found = pl.DataFrame(schema=COPIES_SCHEMA)
    if num_rows:
        # Files of copies are sorted by key, so row groups outside are skipped without reading.
        between = pl.col("key").is_between(pl.lit(first), pl.lit(last))
        paths = [shard.path for shard in context.shards_of(finder, ".parquet")]
        found = pl.concat([pl.scan_parquet(path).filter(between) for path in paths]).collect()
    found = found.sort("key", "reason", "detail").unique("key", keep="first", maintain_order=True)
    path = f"copies/{task.name}.parquet"
    digest = write_table(found, context.path(path), _ROWS_PER_GROUP)
    return Outcome({path: found.height}, num_in=num_rows, num_kept=num_rows, digests={path: digest})


def plan(config: Any, context: Context, merger: str) -> list[Task]:
    """Plan one task for each table of rows, bound to the copies among its neighbours."""
    merged = {shard.path: shard.digest for shard in context.parents[merger].shards}
    return [
        Task(
            table_name(shard),
            {"rows": shard.digest, "copies": merged[copies]},
            DropTask(table=shard.path, copies=copies).to_json(),
        )
        for group in _groups(context)
        for copies in [_merged_path(group)]
        for shard in group
    ]


def run(config: Any, context: Context, task: Task, progress: Progress, merger: str, rule: str) -> Outcome:
    """Drop the copies of one table, except those of sources that are exempt from `rule`."""
    asked = DropTask.from_json(task.arguments)
    rows = pl.read_parquet(context.path_in(rows_stage(context), asked.table))
    found = pl.DataFrame(schema=COPIES_SCHEMA)
    if rows.height:
        between = pl.col("key").is_between(pl.lit(rows["key"].min()), pl.lit(rows["key"].max()))
        found = pl.scan_parquet(context.path_in(merger, asked.copies)).filter(between).collect()
    stays = is_exempt(context.parents["corpus"], rule, rows.columns)
    judged = rows.join(found, on="key", how="left", maintain_order="left").with_columns(
        pl.when(~stays).then(pl.col(name)).alias(name) for name in ("reason", "detail")
    )
    kept = judged.filter(pl.col("reason").is_null()).drop("reason", "detail")
    return publish_judged(context, task, kept, judged.filter(pl.col("reason").is_not_null()))


def stages(
    config: Any, *, rows: str, finder: str, merger: str, dropper: str, rule: str, title: str
) -> list[Stage]:
    """Return the stages `merger` and `dropper`: they drop what `finder` found among the rows of `rows`."""
    return [
        Stage(
            merger,
            title="sorts the copies by the tables that they are in",
            version=1,
            config=None,
            parents=(rows, finder),
            plan=functools.partial(plan_merge, finder=finder),
            run=functools.partial(run_merge, finder=finder),
        ),
        Stage(
            dropper,
            title=title,
            version=1,
            config=config,
            parents=("corpus", rows, merger),
            plan=functools.partial(plan, merger=merger),
            run=functools.partial(run, merger=merger, rule=rule),
        ),
    ]
