"""Stages find_copies and dedup_image: drop exact and near copies of images (not in the paper).

Exact copies have the same stored bytes; near copies have near hashes and matching signatures. Bands of the
hash find pairs without comparing all images: docs/concepts/filtering.md, "Near-duplicate detection".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Ge, Le

from data_prep.accounting.judged import publish_judged
from data_prep.corpus_facts import is_exempt, kept_tables, rows_stage, table_name
from data_prep.formats.parquet import write_table
from data_prep.rules.image import HASH_BITS, IMAGE_DUPLICATES_RULE
from data_prep.rules.image_signature import SIGNATURE_BYTES, are_copies, brightness
from pipeline.core import store
from pipeline.core.facts import Facts
from pipeline.core.records import DropReason
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

DUPLICATE_IMAGE = DropReason("duplicate_image")
NEAR_DUPLICATE_IMAGE = DropReason("near_duplicate_image")

WINDOW = 1000
SIZES = {"perceptual_hash": HASH_BITS // 8, "image_signature": SIGNATURE_BYTES}
_COMPARED_AT_ONCE = 1 << 19  # pairs, with 48 bytes on each side
COPIES_SCHEMA = {"key": pl.String, "reason": pl.String, "detail": pl.String}

UInt64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupImageConfig:
    """`[dedup_image]`: drop copies of images; a run without this table keeps them, as the paper does."""

    exact: bool = True
    """Whether to keep only one of the rows with the same stored image."""
    max_distance: Annotated[int, Ge(0), Le(31)] | None = None
    """Largest number of differing hash bits (of 384) at which two images may count as near copies; their
    signatures must match too. Unset: keep near copies. More bits mean more and shorter bands;
    `benchmarks/data_prep/near_copies.py` measures the cost.
    """
    partitions: Annotated[int, Ge(1)] = 1
    """Tasks for each band. A task holds its share of all keys and hashes: about 100 bytes per row, and 500
    for a row that has another one within `max_distance`.
    """

    def __post_init__(self) -> None:
        if not self.exact and self.max_distance is None:
            raise ValueError("exact is off and max_distance not set: nothing to look for")


@dataclass(frozen=True, slots=True, kw_only=True)
class FindTask(Facts):
    """The kind of copies that a task looks for, and its share of the rows."""

    kind: Literal["exact", "near"]
    band: int  # band of the hashes; 0 for exact copies
    part: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsTask(Facts):
    """A table of rows: its path in the folder of the stage that kept them."""

    table: str


def plan_find(config: DedupImageConfig, context: Context) -> list[Task]:
    """Plan one task for each band (and for exact copies) and partition.

    Each reads two columns of every table.
    """
    tables = kept_tables(context, rows_stage(context))
    inputs = {shard.path: shard.digest for shard in tables}
    num_bands = 0 if config.max_distance is None else config.max_distance + 1
    kinds: list[tuple[Literal["exact", "near"], int]] = [("exact", 0)] if config.exact else []
    kinds += [("near", band) for band in range(num_bands)]
    return [
        Task(f"{kind}.{band:02d}.{part:04d}", inputs, FindTask(kind=kind, band=band, part=part).to_json())
        for kind, band in kinds
        for part in range(config.partitions)
    ]


def run_find(config: DedupImageConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `copies/<task>.parquet`: key of each copy, reason, and key of the image that it is a copy of."""
    asked, stage = FindTask.from_json(task.arguments), rows_stage(context)
    if asked.kind == "exact":
        rows = _read(context, "image_sha256")
        leading = pl.col("image_sha256").str.slice(0, 8).str.to_integer(base=16)
        wanted = (frame.filter(leading % config.partitions == asked.part) for frame in rows)
        found = exact_copies(pl.concat(wanted))
    else:
        assert config.max_distance is not None
        num_bands = config.max_distance + 1
        parts = []
        for number, frame in enumerate(_read(context, "perceptual_hash")):
            frame = frame.with_row_index("row").with_columns(table=pl.lit(number, pl.UInt32))
            frame = frame.with_columns(band=pl.Series(band_values(hash_bytes(frame), asked.band, num_bands)))
            parts.append(frame.filter(pl.col("band") % config.partitions == asked.part))
        near = near_hashes(pl.concat(parts), config.max_distance)
        paths = [context.path_in(stage, shard.path) for shard in kept_tables(context, stage)]
        found = near_copies(with_signatures(near, paths), config.max_distance)
    path = f"copies/{task.name}.parquet"
    write_table(found.sort("key"), context.path(path))
    num_rows = context.parents[stage].num_kept
    return Outcome({path: found.height}, num_in=num_rows, num_kept=num_rows)


def exact_copies(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the copies among rows with key and image_sha256: all except the lowest key of each image."""
    rows = rows.sort("image_sha256", "key").with_columns(first=pl.col("key").first().over("image_sha256"))
    copies = rows.filter(pl.col("key") != pl.col("first"))
    return copies.select("key", reason=pl.lit(str(DUPLICATE_IMAGE)), detail="first")


def near_hashes(rows: pl.DataFrame, max_distance: int) -> pl.DataFrame:
    """Keep the rows (key, perceptual_hash, band) that have a near one with the same value of the band."""
    # Rows with one hash are adjacent, so the first represents all of them.
    rows = rows.sort("band", "perceptual_hash", "key")
    one = rows.unique("perceptual_hash", keep="first", maintain_order=True)
    near = np.zeros(one.height, np.bool_)
    for first, second in _near_pairs(one, max_distance):
        near[first] = near[second] = True
    chosen = one.filter(pl.Series(near)).select("perceptual_hash")
    return pl.concat(
        [
            rows.filter(pl.len().over("perceptual_hash") > 1),
            rows.filter(pl.len().over("perceptual_hash") == 1).join(chosen, on="perceptual_hash", how="semi"),
        ]
    )


def with_signatures(rows: pl.DataFrame, paths: Sequence[str]) -> pl.DataFrame:
    """Add image_signature to rows with `table`, an index into the paths, and `row`, an index into that table.

    This reads only the row groups that hold such rows, one at a time: most images have no near one.
    """
    # An empty first part, which gives the type if there are no rows.
    parts = [rows.clear().with_columns(image_signature=pl.lit(None, pl.Binary))]
    for of_table in rows.sort("table", "row").partition_by("table", maintain_order=True):
        row_N = of_table["row"].to_numpy()
        with store.open_read(paths[of_table["table"][0]]) as file:
            table = pq.ParquetFile(file)
            start = 0
            for group in range(table.num_row_groups):
                stop = start + table.metadata.row_group(group).num_rows
                chosen = slice(*np.searchsorted(row_N, [start, stop]))
                if chosen.start < chosen.stop:
                    column = table.read_row_group(group, columns=["image_signature"])["image_signature"]
                    taken = pl.Series(pl.from_arrow(column.take(pa.array(row_N[chosen] - start))))
                    parts.append(of_table[chosen].with_columns(image_signature=taken))
                start = stop
    return pl.concat(parts)


def near_copies(rows: pl.DataFrame, max_distance: int) -> pl.DataFrame:
    """Return copies among rows (key, perceptual_hash, image_signature, band) with one value of the band."""
    marks = ["perceptual_hash", "image_signature"]
    rows = rows.with_columns(brightness=pl.Series(brightness(_column_bytes(rows, "image_signature"))))
    # A fixed order, so that every band compares two signatures in the same way.
    rows = rows.sort("band", "perceptual_hash", "brightness", "image_signature", "key")
    # Equal marks are one image, so everything compared below differs.
    rows = rows.with_columns(first=pl.col("key").first().over(marks))
    equal = rows.filter(pl.col("key") != pl.col("first")).select("key", detail="first")
    rows = rows.filter(pl.col("key") == pl.col("first")).drop("first")
    near = _nearest(rows, max_distance)
    pairs = pl.DataFrame({"nearest": pl.Series(near, dtype=pl.Int64), "key": rows["key"]}).filter(
        pl.col("nearest") >= 0
    )
    by_rank = rows["key"].sort()
    copies = pairs.select("key", detail=by_rank.gather(pairs["nearest"]))
    return pl.concat([equal, copies]).select("key", reason=pl.lit(str(NEAR_DUPLICATE_IMAGE)), detail="detail")


def band_values(hash_NB: npt.NDArray[np.uint8], band: int, num_bands: int) -> UInt64Array:
    """Return the value of a band of each hash as a number, uint64 [N]; equal bits have equal numbers.

    A band has the bits band, band + num_bands, … of a hash.
    """
    value_N = np.zeros(len(hash_NB), np.uint64)
    for start in range(0, len(hash_NB), _COMPARED_AT_ONCE):
        bits = np.unpackbits(hash_NB[start : start + _COMPARED_AT_ONCE], axis=1)[:, band::num_bands]
        packed = np.packbits(bits, axis=1)
        padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
        words = np.ascontiguousarray(padded).view(np.uint64)
        for column in range(words.shape[1]):  # at most 6; the whole hash resolves collisions
            block = value_N[start : start + _COMPARED_AT_ONCE]
            block *= np.uint64(0x9E3779B97F4A7C15)
            block ^= words[:, column]
    return value_N


def hash_bytes(rows: pl.DataFrame) -> npt.NDArray[np.uint8]:
    """Return perceptual_hash as uint8 [N, 48]."""
    return _column_bytes(rows, "perceptual_hash")


def _column_bytes(rows: pl.DataFrame, name: str) -> npt.NDArray[np.uint8]:
    """Return a column of binary values of one length as uint8 [N, bytes]."""
    table: Any = rows[name].to_arrow()
    column = table.cast(pa.large_binary())
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not len(column):
        return np.empty((0, SIZES[name]), np.uint8)
    data = np.frombuffer(column.buffers()[2], np.uint8)
    first = np.frombuffer(column.buffers()[1], np.int64)[column.offset]
    return data[first : first + len(column) * SIZES[name]].reshape(len(column), SIZES[name])


def _near_pairs(
    rows: pl.DataFrame, max_distance: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield the positions of pairs with near hashes in blocks, for rows sorted by band and hash."""
    word_NW = np.ascontiguousarray(hash_bytes(rows)).view(np.uint64)
    band_N = rows["band"].to_numpy()
    active = np.arange(rows.height)
    for step in range(1, WINDOW + 1):
        active = active[active + step < rows.height]
        active = active[band_N[active] == band_N[active + step]]
        if not len(active):
            break
        for start in range(0, len(active), _COMPARED_AT_ONCE):
            one = active[start : start + _COMPARED_AT_ONCE]
            distance = np.bitwise_count(word_NW[one] ^ word_NW[one + step]).sum(axis=1, dtype=np.int32)
            one = one[distance <= max_distance]
            yield one, one + step


def _nearest(rows: pl.DataFrame, max_distance: int) -> npt.NDArray[np.int64]:
    """Return the rank of the lowest lower key that each sorted row copies, int64 [N]; -1 for no copy."""
    signature_NB = _column_bytes(rows, "image_signature")
    rank_N = rows["key"].rank("ordinal").cast(pl.Int64).to_numpy() - 1
    none = rows.height
    nearest_N = np.full(rows.height, none, np.int64)
    for one, two in _near_pairs(rows, max_distance):
        copies = are_copies(signature_NB, signature_NB, one, two)
        one, two = one[copies], two[copies]
        higher = np.where(rank_N[one] > rank_N[two], one, two)
        np.minimum.at(nearest_N, higher, np.minimum(rank_N[one], rank_N[two]))
    nearest_N[nearest_N == none] = -1
    return nearest_N


def _read(context: Context, column: str) -> Iterator[pl.DataFrame]:
    """Yield key and one column of each table of rows."""
    stage = rows_stage(context)
    for shard in kept_tables(context, stage):
        yield pl.read_parquet(context.path_in(stage, shard.path), columns=["key", column])


def plan(config: Any, context: Context, finder: str = "find_copies") -> list[Task]:
    """Plan one task for each table of rows, bound to all copies that the stage `finder` found."""
    copies = {shard.path: shard.digest for shard in context.parents[finder].shards}
    return [
        Task(table_name(shard), {"rows": shard.digest, **copies}, RowsTask(table=shard.path).to_json())
        for shard in kept_tables(context, rows_stage(context))
    ]


def run(
    config: Any,
    context: Context,
    task: Task,
    progress: Progress,
    finder: str = "find_copies",
    rule: str = IMAGE_DUPLICATES_RULE,
) -> Outcome:
    """Drop the copies of one table, except those of sources that are exempt from `rule`."""
    table = RowsTask.from_json(task.arguments).table
    rows = pl.read_parquet(context.path_in(rows_stage(context), table))
    found = _copies_among(context, finder, rows["key"])
    stays = is_exempt(context.parents["corpus"], rule, rows.columns)
    judged = rows.join(found, on="key", how="left", maintain_order="left").with_columns(
        pl.when(~stays).then(pl.col(name)).alias(name) for name in ("reason", "detail")
    )
    kept = judged.filter(pl.col("reason").is_null()).drop("reason", "detail")
    return publish_judged(context, task, kept, judged.filter(pl.col("reason").is_not_null()))


def _copies_among(context: Context, finder: str, keys: pl.Series) -> pl.DataFrame:
    """Return key, reason and detail of the copies among some keys; exact copies take precedence."""
    if not len(keys):
        return pl.DataFrame(schema=COPIES_SCHEMA)
    # Tables of copies and of rows are sorted by key, so row groups outside are skipped without reading.
    paths = [shard.path for shard in context.shards_of(finder, ".parquet")]
    between = pl.col("key").is_between(pl.lit(keys.min()), pl.lit(keys.max()))
    found = pl.concat([pl.scan_parquet(path).filter(between) for path in paths]).collect()
    return found.sort("key", "reason", "detail").unique("key", keep="first", maintain_order=True)


def find_stage(config: DedupImageConfig, *, rows: str) -> Stage:
    """Return the stage that looks for copies among the rows that the stage `rows` kept."""
    return Stage(
        "find_copies",
        title="finds copies of images, exact or near",
        version=2,
        config=config,
        parents=("corpus", rows),
        plan=plan_find,
        run=run_find,
    )


def stage(config: DedupImageConfig, *, rows: str) -> Stage:
    """Return the stage that drops the copies among the rows that the stage `rows` kept."""
    return Stage(
        "dedup_image",
        title="drops copies; the lowest key of each image stays",
        version=1,
        config=config,
        parents=("corpus", rows, "find_copies"),
        plan=plan,
        run=run,
    )
