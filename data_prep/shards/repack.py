"""Rewrites shards: with another number of samples in each, with a part of them by key, or merged.

Each operation is a short run (`pipeline.runner`): a stage `rows` that chooses rows of tars, if rows are
chosen at all, and a stage `shards` that packs them like every corpus. So it resumes where it stopped,
accounts for every row and gives the same bytes on any number of workers, and its output is a corpus like its
input.
"""

import functools
import os
from dataclasses import dataclass, field

import polars as pl
import pyarrow.parquet as pq

from data_prep.accounting.judged import publish_judged
from data_prep.corpus_facts import exemptions_of_shards, with_exemptions
from data_prep.dedup.exact import DUPLICATE, partition_range
from data_prep.formats.parquet import write_table
from data_prep.formats.shards import CorpusShard, ShardTask, corpus_shards, cut, write_shard
from data_prep.sources.table import naming_damage
from pipeline.core import store
from pipeline.core.config import NOT_IN_DIGEST, digest
from pipeline.core.facts import Facts
from pipeline.core.files.foreign import foreign
from pipeline.core.records import ConfigError, DropReason, InputError, Shard
from pipeline.core.shard_format import tar_of
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task, repair_remedy

NOT_LISTED = DropReason("not_listed")  # the row's key is not in the list of keys
KEY_PATTERN = "^[0-9a-f]{32}$"

_REPAIR = "remove this folder of the stage and give the same command again"
_ROWS_PER_PARTITION = 1_000_000  # in memory at once when merging corpora
_KEYS_PER_BUCKET = 4_000_000  # in memory at once when reading a list of keys
_BYTES_PER_LINE = 33


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackConfig:
    """The inputs, and the size of the output shards. Digests of their shards bind the corpora."""

    corpora: tuple[str, ...] = field(metadata=NOT_IN_DIGEST)  # folders, as `corpus_shards` takes them
    samples_per_shard: int
    keys: str | None = field(default=None, metadata=NOT_IN_DIGEST)  # list of keys: .txt, .csv or .parquet

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ConfigError(f"--samples {self.samples_per_shard}: a shard holds at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysTask(Facts):
    """The number of ranges of the listed keys."""

    buckets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetTask(Facts):
    """The sidecar of a shard."""

    table: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeTask(Facts):
    """The number of ranges of the merged rows."""

    partitions: int


def reshard_stages(config: RepackConfig) -> tuple[Stage, ...]:
    """Return the stage that keeps samples and order and changes the number of samples in each shard."""
    return (_packing(config, chosen=False),)


def subset_stages(config: RepackConfig) -> tuple[Stage, ...]:
    """Return the stages that keep the samples with listed keys, in the corpus's order."""
    return (
        Stage("keys", "the listed keys, sorted", 1, config, (), plan_keys, run_keys, repair=_REPAIR),
        Stage(
            "rows",
            "rows whose keys are listed",
            1,
            config,
            ("keys",),
            plan_subset,
            run_subset,
            may_be_empty=True,
            repair=_REPAIR,
        ),
        _packing(config, chosen=True),
    )


def merge_stages(config: RepackConfig) -> tuple[Stage, ...]:
    """Return the stages that merge all samples of several corpora in the order of their keys.

    If several samples have one key, that of the first corpus stays.
    """
    return (
        Stage(
            "rows",
            "rows of all corpora, one for each key",
            1,
            config,
            (),
            plan_merge,
            run_merge,
            repair=_REPAIR,
        ),
        _packing(config, chosen=True),
    )


def _packing(config: RepackConfig, *, chosen: bool) -> Stage:
    parents = ("rows",) if chosen else ()
    return Stage(
        "shards",
        "tar shards with a Parquet sidecar",
        1,
        config,
        parents,
        plan_shards,
        run_shards,
        repair=_REPAIR,
    )


def plan_shards(config: RepackConfig, context: Context) -> list[Task]:
    """Plan one task for each shard."""
    if "rows" in context.parents:
        if context.parents["rows"].num_kept == 0:
            raise InputError(
                f"{config.keys}: none of its keys is in {config.corpora[0]}; give keys of its rows"
            )
        tables = [shard for shard in context.parents["rows"].shards if shard.path.startswith("kept/")]
    else:
        tables = [
            Shard(shard.table, shard.num_samples, 0, shard.digest)
            for corpus in config.corpora
            for shard in corpus_shards(corpus)
        ]
    digests = {table.path: table.digest for table in tables}
    exempt = _exempt(config)
    return [
        Task(
            f"{number:05d}",
            {f"table {place}": digests[piece.table] for place, piece in enumerate(pieces)} | exempt,
            ShardTask(pieces=pieces).to_json(),
        )
        for number, pieces in enumerate(cut(tables, config.samples_per_shard))
    ]


def run_shards(config: RepackConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Copy one shard's images, captions and columns."""
    frames = []
    for piece in ShardTask.from_json(task.arguments).pieces:
        if "rows" in context.parents:
            rows = pl.scan_parquet(context.path_in("rows", piece.table))
        else:
            rows = _sidecar(piece.table)
        frames.append(rows.slice(piece.first, piece.count))
    rows = pl.concat(frames, how="diagonal_relaxed")
    remedy = f"{repair_remedy('shards')}, with the file of the run that made it; or make that corpus again"
    return write_shard(context, task.name, rows.collect(), lambda tar: tar, remedy)


def plan_keys(config: RepackConfig, context: Context) -> list[Task]:
    """Plan one task for each range of keys; each reads the whole list and holds its range."""
    path = str(config.keys)
    if not store.exists(path):
        raise InputError(f"{path}: no such file; give a list of keys: .txt, .csv or .parquet")
    if path.endswith(".parquet"):
        with naming_damage(path):
            num_keys = pl.scan_parquet(path).select(pl.len()).collect().item()
    else:
        num_keys = store.num_bytes(path) // _BYTES_PER_LINE
    buckets = num_keys // _KEYS_PER_BUCKET + 1
    inputs = {"keys": store.digest_file(path)}
    return [Task(f"{number:05d}", inputs, KeysTask(buckets=buckets).to_json()) for number in range(buckets)]


def run_keys(config: RepackConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Sort one range of the listed keys.

    Raises:
        InputError: if a line is not a key, or the list has no keys.
    """
    first, end = partition_range(int(task.name), KeysTask.from_json(task.arguments).buckets)
    condition = pl.col("key") >= first
    if end is not None:
        condition &= pl.col("key") < end
    with naming_damage(str(config.keys)):
        keys = _scan_keys(str(config.keys))
        if int(task.name) == 0:
            _refuse_other_than_keys(str(config.keys), keys)
        listed = keys.filter(condition).collect(engine="streaming")
    unique = listed.unique().sort("key")
    path = f"kept/{task.name}.parquet"
    write_table(unique, context.path(path))
    repeated = listed.height - unique.height
    return Outcome(
        {path: unique.height},
        num_in=listed.height,
        num_kept=unique.height,
        dropped={DUPLICATE: repeated} if repeated else {},
    )


def _refuse_other_than_keys(path: str, keys: pl.LazyFrame) -> None:
    wrong = keys.filter(~pl.col("key").str.contains(KEY_PATTERN).fill_null(False)).head(1).collect()
    if wrong.height:
        raise InputError(
            f"{path}: {wrong.item()!r} is not a key; a key is 32 lower-case hex digits, as in a sidecar's"
            " column key"
        )
    if keys.head(1).collect().is_empty():
        raise InputError(f"{path}: no keys in it; give one per line, or in a column key")


def _scan_keys(path: str) -> pl.LazyFrame:
    ending = os.path.splitext(path)[1].lower()
    if ending in (".txt", ".csv") and store.num_bytes(path) == 0:
        return pl.LazyFrame(schema={"key": pl.String})
    if ending == ".txt":
        lines = pl.scan_csv(
            path, has_header=False, new_columns=["key"], separator="\t", quote_char=None, infer_schema=False
        )
        return lines.select(pl.col("key").str.strip_chars()).filter(pl.col("key") != "")
    if ending not in (".csv", ".parquet"):
        raise InputError(f"{path}: unknown kind of list; give .txt (one key a line), .csv or .parquet")
    table = pl.scan_parquet(path) if ending == ".parquet" else pl.scan_csv(path, infer_schema=False)
    found = table.collect_schema().names()
    if "key" not in found:
        raise InputError(f"{path}: no column key; found {', '.join(found)[:200]}")
    return table.select(pl.col("key").cast(pl.String))


def plan_subset(config: RepackConfig, context: Context) -> list[Task]:
    """Plan one task for each shard of the corpus."""
    listed = digest([[shard.path, shard.digest] for shard in context.parents["keys"].shards])
    exempt = _exempt(config)
    return [
        Task(
            f"{number:05d}",
            {"shard": shard.digest, "keys": listed, **exempt},
            SubsetTask(table=shard.table).to_json(),
        )
        for number, shard in enumerate(corpus_shards(config.corpora[0]))
    ]


def run_subset(config: RepackConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Keep the rows of one shard that have listed keys.

    This reads only the shard's range of keys from the list.
    """
    rows = _sidecar(SubsetTask.from_json(task.arguments).table).collect()
    between = pl.col("key").is_between(pl.lit(rows["key"].min()), pl.lit(rows["key"].max()))
    paths = [shard.path for shard in context.shards_of("keys") if shard.num_samples]
    listed = pl.scan_parquet(paths).filter(between).collect(engine="streaming")
    kept = rows.join(listed, on="key", how="semi", maintain_order="left")
    rest = rows.join(listed, on="key", how="anti", maintain_order="left")
    return publish_judged(context, task, kept, rest.with_columns(reason=pl.lit(str(NOT_LISTED))))


def plan_merge(config: RepackConfig, context: Context) -> list[Task]:
    """Plan one task for each range of keys."""
    corpora = [corpus_shards(corpus) for corpus in config.corpora]
    total = sum(shard.num_samples for shards in corpora for shard in shards)
    partitions = total // _ROWS_PER_PARTITION + 1
    inputs = {"corpora": digest([[shard.digest for shard in shards] for shards in corpora])}
    inputs |= _exempt(config)
    return [
        Task(f"{number:05d}", inputs, MergeTask(partitions=partitions).to_json())
        for number in range(partitions)
    ]


def run_merge(config: RepackConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Sort one range of keys of all corpora; of rows with one key, keep that of the first corpus."""
    first, end = partition_range(int(task.name), MergeTask.from_json(task.arguments).partitions)
    condition = pl.col("key") >= first
    if end is not None:
        condition &= pl.col("key") < end
    frames = [
        _sidecar(shard.table).filter(condition).with_columns(file=pl.lit(number, dtype=pl.Int32))
        for number, corpus in enumerate(config.corpora)
        for shard in corpus_shards(corpus)
        if _overlaps(shard, first, end)
    ]
    if not frames:  # the columns of any sidecar, without rows
        frames = [_sidecar(corpus_shards(config.corpora[0])[0].table).head(0).with_columns(file=pl.lit(0))]
    rows = pl.concat(frames, how="diagonal_relaxed").collect().sort("key", "file", maintain_order=True)
    repeated = pl.col("key") == pl.col("key").shift(1)
    rows = rows.with_columns(reason=pl.when(repeated).then(pl.lit(DUPLICATE)))
    kept = rows.filter(pl.col("reason").is_null()).drop("reason")
    return publish_judged(context, task, kept, rows.filter(pl.col("reason").is_not_null()))


def _sidecar(table: str) -> pl.LazyFrame:
    """Return a shard's rows with their tar and the rules that do not apply to them."""
    rows = with_exemptions(pl.scan_parquet(table), _exemptions_of(os.path.dirname(table)))
    return rows.with_columns(tar=pl.lit(tar_of(table)))


@functools.cache
def _exemptions_of(folder: str) -> dict[str, tuple[str, ...]]:
    return exemptions_of_shards(folder)


def _exempt(config: RepackConfig) -> dict[str, str]:
    """Return the sources of the corpora's runs as an input of a task, if the runs recorded them."""
    folders = {os.path.dirname(shard.table) for corpus in config.corpora for shard in corpus_shards(corpus)}
    found = [exemptions_of_shards(folder) for folder in sorted(folders)]
    return {"exemptions": digest(found)} if any(found) else {}


def _overlaps(shard: CorpusShard, first: str, end: str | None) -> bool:
    lowest, highest = _key_range(shard.table)
    return highest >= first and (end is None or lowest < end)


@functools.cache  # two short strings per shard; each task needs all of them
def _key_range(table: str) -> tuple[str, str]:
    """Return the lowest and highest key by a sidecar's statistics; the widest range without them."""
    with foreign(table, "sidecar", "build the shard again"), store.open_read(table) as file:
        metadata = pq.read_metadata(file)
    place = metadata.schema.names.index("key")
    found = [metadata.row_group(group).column(place).statistics for group in range(metadata.num_row_groups)]
    if not found or any(item is None or not item.has_min_max for item in found):
        return "", "g"
    return min(item.min for item in found), max(item.max for item in found)
