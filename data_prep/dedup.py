"""Stage dedup: exact duplicates out, and the rows shuffled, once, before anything is downloaded.

Rows are ordered by key, a digest of (url, caption): equal pairs come together wherever their tables were,
and the order is as good as random and the same on any number of machines. Partition p of P holds the keys
of its share of the range, so P files one after the other are the shuffled corpus.
"""

from dataclasses import dataclass

import polars as pl

from data_prep.drop_table import publish_judged
from pipeline.stage import Context, Outcome, Progress, Task

DUPLICATE = "duplicate"
_PREFIX_HEX_DIGITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupConfig:
    """`[dedup]`."""

    partitions: int = 4  # files that the corpus is cut into; about 10,000 rows each is what download likes

    def __post_init__(self) -> None:
        if not 1 <= self.partitions <= 16**_PREFIX_HEX_DIGITS:
            raise ValueError("partitions must be at least 1")


def tasks(config: DedupConfig, context: Context) -> list[Task]:
    """One task a partition; each reads its range of every filtered table."""
    kept = [shard for shard in context.parents["filter_text"].shards if shard.path.startswith("kept/")]
    inputs = {shard.path: shard.digest for shard in kept}
    width = len(str(config.partitions - 1))
    return [
        Task(f"{number:0{max(width, 5)}d}", inputs, {"paths": [shard.path for shard in kept]})
        for number in range(config.partitions)
    ]


def run(config: DedupConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Sort one partition by key and keep the lowest (table, row) of each."""
    paths = [context.path_in("filter_text", path) for path in task.arguments["paths"]]
    first, end = partition_range(int(task.name), config.partitions)
    # Files are sorted by key, so whole row groups outside the range are skipped unread.
    condition = pl.col("key") >= first
    if end is not None:
        condition &= pl.col("key") < end
    rows = pl.concat([pl.scan_parquet(path) for path in paths], how="diagonal").filter(condition).collect()
    rows = rows.sort("key", "file", "row")
    extra_copy = pl.col("key") == pl.col("key").shift(1)
    rows = rows.with_columns(reason=pl.when(extra_copy).then(pl.lit(DUPLICATE)))
    kept = rows.filter(pl.col("reason").is_null()).drop("reason")
    return publish_judged(context, task, kept, rows.filter(pl.col("reason").is_not_null()))


def partition_range(number: int, partitions: int) -> tuple[str, str | None]:
    """First key prefix of a partition and of the next one (None after the last), as hex digits."""
    span = 16**_PREFIX_HEX_DIGITS

    def prefix(which: int) -> str:
        return f"{which * span // partitions:0{_PREFIX_HEX_DIGITS}x}"

    return prefix(number), prefix(number + 1) if number + 1 < partitions else None
