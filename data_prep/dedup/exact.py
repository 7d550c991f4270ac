"""Stage dedup: removes exact duplicates and shuffles the rows once, before the download.

Rows are ordered by key, a digest of (url, caption): equal pairs meet whatever their tables, and the order is
as good as random and the same on any number of machines. Partition p of P holds the keys of its share of the
range, so the P files in sequence are the shuffled corpus.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import polars as pl
from annotated_types import Ge, Le

from data_prep.accounting.judged import publish_judged
from pipeline.core.facts import Facts
from pipeline.core.records import ConfigError, DropReason
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

DUPLICATE = DropReason("duplicate")
_PREFIX_HEX_DIGITS = 8
_ROWS_PER_TASK = 1_000_000  # about a gigabyte with its sorted copy
_MAX_PARTITION_ROWS = 2_000_000  # a task holds a partition in memory: 3 GB (1.2 million took 1.8 GB)
_PARTITION_ROWS = 10_000  # that suit the download
_FEWEST_PARTITIONS = 4  # several processes share a small corpus
_MIN_TASKS = 64  # below, one task a partition


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupConfig:
    """`[dedup]`."""

    partitions: Annotated[int, Ge(1), Le(16**_PREFIX_HEX_DIGITS)] | None = None
    """Files that the shuffled corpus is cut into; one of more than 2,000,000 rows is refused. Unset: one for
    each 10,000 rows, which suits the download, but at least 4.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupTask(Facts):
    """Tables to read, and the partition after the task's last one (None: it has only one)."""

    paths: Sequence[str]
    end: int | None = None
    partitions: int | None = None  # of all, unless the run says how many


def plan(config: DedupConfig, context: Context) -> list[Task]:
    """Plan one task for each partition, or for several neighbours if a large corpus has many small ones.

    Each task looks into every filtered table, so there are no more of them than memory asks for.

    Raises:
        ConfigError: if a partition would not fit into memory.
    """
    kept = [shard for shard in context.parents["filter_text"].shards if shard.path.startswith("kept/")]
    inputs = {shard.path: shard.digest for shard in kept}
    total = sum(shard.num_samples for shard in kept)
    fitting = max(_FEWEST_PARTITIONS, math.ceil(total / _PARTITION_ROWS))
    partitions = config.partitions or fitting
    width = max(len(str(partitions - 1)), 5)
    if total > partitions * _MAX_PARTITION_ROWS:
        raise ConfigError(
            f"[dedup] partitions = {partitions}: each would hold {total // partitions:,} of {total:,} rows in"
            f" memory; leave partitions out, or set {fitting}, which suits the download"
        )
    num_tasks = min(partitions, max(_MIN_TASKS, math.ceil(total / _ROWS_PER_TASK)))
    bounds = [number * partitions // num_tasks for number in range(num_tasks + 1)]
    tasks = []
    for first, end in itertools.pairwise(bounds):
        asked = DedupTask(
            paths=[shard.path for shard in kept],
            end=end if end > first + 1 else None,
            partitions=None if config.partitions else partitions,
        )
        tasks.append(Task(f"{first:0{width}d}", inputs, asked.to_json()))
    return tasks


def run(config: DedupConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Sort some partitions' rows by key and keep the lowest (table, row) of each; one file a partition."""
    asked = DedupTask.from_json(task.arguments)
    paths = [context.path_in("filter_text", path) for path in asked.paths]
    partitions = config.partitions or asked.partitions
    assert partitions is not None  # `plan` has set it
    first_partition = int(task.name)
    last_partition = (asked.end or first_partition + 1) - 1
    first, end = partition_range(first_partition, partitions)[0], None
    if last_partition + 1 < partitions:
        end = partition_range(last_partition, partitions)[1]
    # Files are sorted by key, so row groups outside the range are skipped without reading.
    condition = pl.col("key") >= first
    if end is not None:
        condition &= pl.col("key") < end
    rows = pl.concat([pl.scan_parquet(path) for path in paths], how="diagonal").filter(condition).collect()
    rows = rows.sort("key", "file", "row")
    extra_copy = pl.col("key") == pl.col("key").shift(1)
    rows = rows.with_columns(reason=pl.when(extra_copy).then(pl.lit(DUPLICATE)))
    kept = rows.filter(pl.col("reason").is_null()).drop("reason")
    dropped = rows.filter(pl.col("reason").is_not_null())
    if last_partition == first_partition:
        return publish_judged(context, task, kept, dropped)
    ends = [
        kept["key"].search_sorted(end) if (end := partition_range(number, partitions)[1]) else kept.height
        for number in range(first_partition, last_partition + 1)
    ]
    pieces = {
        f"{number:0{len(task.name)}d}": kept.slice(begin, int(stop) - begin)
        for number, (begin, stop) in enumerate(itertools.pairwise([0, *ends]), start=first_partition)
    }
    return publish_judged(context, task, kept, dropped, pieces=pieces)


def partition_range(number: int, partitions: int) -> tuple[str, str | None]:
    """Return the first key prefix of a partition and of the next one (None after the last), as hex digits."""
    span = 16**_PREFIX_HEX_DIGITS

    def prefix(which: int) -> str:
        return f"{which * span // partitions:0{_PREFIX_HEX_DIGITS}x}"

    return prefix(number), prefix(number + 1) if number + 1 < partitions else None


def partition_of_key(key: str, partitions: int) -> int:
    """Return the number of the partition that a key belongs to, the inverse of `partition_range`."""
    prefix = int(key[:_PREFIX_HEX_DIGITS], base=16)
    return ((prefix + 1) * partitions - 1) // (1 << 4 * _PREFIX_HEX_DIGITS)


def stage(config: DedupConfig) -> Stage:
    """Return the stage that removes exact duplicates and shuffles the rows once."""
    return Stage(
        "dedup",
        title="drops exact duplicates and shuffles the rows once",
        version=1,
        config=config,
        parents=("filter_text",),
        plan=plan,
        run=run,
    )
