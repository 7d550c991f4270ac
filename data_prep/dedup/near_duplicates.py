"""Stages gather_hashes to dedup_image: drop exact and near copies of images (not in the paper).

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

from data_prep.corpus_facts import NeighboursTask, kept_tables, neighbours, rows_stage, table_name
from data_prep.dedup import copies
from data_prep.dedup.parts import read_part, write_parts
from data_prep.formats.parquet import write_table
from data_prep.rules.image import HASH_BITS, IMAGE_DUPLICATES_RULE
from data_prep.rules.image_signature import SIGNATURE_BYTES, are_copies, brightness
from pipeline.core import store
from pipeline.core.facts import Facts
from pipeline.core.records import DropReason, Shard
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

DUPLICATE_IMAGE = DropReason("duplicate_image")
NEAR_DUPLICATE_IMAGE = DropReason("near_duplicate_image")

WINDOW = 1000
SIZES = {"perceptual_hash": HASH_BITS // 8, "image_signature": SIGNATURE_BYTES}
_COMPARED_AT_ONCE = 1 << 19  # pairs, with 48 bytes on each side
_ROWS_GATHERED = 500_000  # about half a gigabyte with a sorted copy

Kind = Literal["exact", "near"]
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

    kind: Kind
    band: int  # band of the hashes; 0 for exact copies
    part: int


def _searches(config: DedupImageConfig) -> list[tuple[Kind, int]]:
    """Return each kind of copies and each band that a run looks at."""
    num_bands = 0 if config.max_distance is None else config.max_distance + 1
    exact: list[tuple[Kind, int]] = [("exact", 0)] if config.exact else []
    return [*exact, *(("near", band) for band in range(num_bands))]


def plan_gather(config: DedupImageConfig, context: Context) -> list[Task]:
    """Plan one task for neighbouring tables of some hundred thousand rows."""
    return [
        Task(
            table_name(group[0]),
            {shard.path: shard.digest for shard in group},
            NeighboursTask(tables=[shard.path for shard in group]).to_json(),
        )
        for group in neighbours(kept_tables(context, rows_stage(context)), _ROWS_GATHERED)
    ]


def run_gather(config: DedupImageConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `hashes/<kind>.<band>.<task>.parquet`, in which the rows of each part are adjacent.

    So who looks for copies opens as many files as there are such tasks, not every table of rows.
    """
    columns = ["key"]
    columns += ["image_sha256"] if config.exact else []
    columns += SIZES if config.max_distance is not None else ()
    stage = rows_stage(context)
    paths = [context.path_in(stage, table) for table in NeighboursTask.from_json(task.arguments).tables]
    rows = pl.concat([pl.read_parquet(path, columns=columns) for path in paths])
    outputs, digests = {}, {}
    searches = _searches(config)
    for number, (kind, band) in enumerate(searches, start=1):
        path = gathered_path(kind, band, task.name)
        digests[path] = write_parts(_with_part(rows, config, kind, band), context.path(path))
        outputs[path] = rows.height
        progress(number, len(searches), "bands")
    return Outcome(outputs, num_in=rows.height, num_kept=rows.height, digests=digests)


def gathered_path(kind: Kind, band: int, task: str) -> str:
    """Return the file in the folder of gather_hashes that a search reads of one task."""
    return f"hashes/{kind}.{band:02d}.{task}.parquet"


def _with_part(rows: pl.DataFrame, config: DedupImageConfig, kind: Kind, band: int) -> pl.DataFrame:
    """Return the columns that a search reads, with `part`, the task that reads the row."""
    if kind == "exact":
        leading = pl.col("image_sha256").str.slice(0, 8).str.to_integer(base=16)
        return rows.select((leading % config.partitions).cast(pl.UInt32).alias("part"), "key", "image_sha256")
    assert config.max_distance is not None
    value = pl.Series(band_values(hash_bytes(rows), band, config.max_distance + 1))
    # The long signatures come last, so that what is read before them is one range of bytes.
    return rows.select((value % config.partitions).cast(pl.UInt32).alias("part"), "key", *SIZES)


def plan_find(config: DedupImageConfig, context: Context) -> list[Task]:
    """Plan one task for each band (and for exact copies) and partition."""
    tasks = []
    for kind, band in _searches(config):
        inputs = {shard.path: shard.digest for shard in _gathered(context, kind, band)}
        for part in range(config.partitions):
            asked = FindTask(kind=kind, band=band, part=part)
            tasks.append(Task(f"{kind}.{band:02d}.{part:04d}", inputs, asked.to_json()))
    return tasks


def _gathered(context: Context, kind: Kind, band: int) -> list[Shard]:
    beginning = gathered_path(kind, band, "").removesuffix(".parquet")
    return [shard for shard in context.parents["gather_hashes"].shards if shard.path.startswith(beginning)]


def run_find(config: DedupImageConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `copies/<task>.parquet`: key of each copy, reason, and key of the image that it is a copy of."""
    asked = FindTask.from_json(task.arguments)
    shards = _gathered(context, asked.kind, asked.band)
    paths = [context.path_in("gather_hashes", shard.path) for shard in shards]
    if asked.kind == "exact":
        found = exact_copies(read_part(paths, asked.part, ["key", "image_sha256"]))
    else:
        assert config.max_distance is not None
        rows = read_part(paths, asked.part, ["key", "perceptual_hash"])
        values = band_values(hash_bytes(rows), asked.band, config.max_distance + 1)
        near = near_hashes(rows.with_columns(band=pl.Series(values)), config.max_distance)
        found = near_copies(with_signatures(near, paths), config.max_distance)
    path = f"copies/{task.name}.parquet"
    digest = write_table(found.sort("key"), context.path(path))
    num_rows = context.parents["gather_hashes"].num_kept
    return Outcome({path: found.height}, num_in=num_rows, num_kept=num_rows, digests={path: digest})


def exact_copies(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the copies among rows with key and image_sha256: all except the lowest key of each image."""
    rows = rows.sort("image_sha256", "key").with_columns(first=pl.col("key").first().over("image_sha256"))
    others = rows.filter(pl.col("key") != pl.col("first"))
    return others.select("key", reason=pl.lit(str(DUPLICATE_IMAGE)), detail="first")


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
        with store.open_read(paths[of_table["table"][0]], ahead=False) as file:
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
    near_ones = pairs.select("key", detail=by_rank.gather(pairs["nearest"]))
    return pl.concat([equal, near_ones]).select(
        "key", reason=pl.lit(str(NEAR_DUPLICATE_IMAGE)), detail="detail"
    )


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
        match = are_copies(signature_NB, signature_NB, one, two)
        one, two = one[match], two[match]
        higher = np.where(rank_N[one] > rank_N[two], one, two)
        np.minimum.at(nearest_N, higher, np.minimum(rank_N[one], rank_N[two]))
    nearest_N[nearest_N == none] = -1
    return nearest_N


def stages(config: DedupImageConfig, *, rows: str) -> list[Stage]:
    """Return the stages that drop the copies among the rows that the stage `rows` kept."""
    return [
        Stage(
            "gather_hashes",
            title="sorts the hashes of images by who compares them",
            version=1,
            config=config,
            parents=("corpus", rows),
            plan=plan_gather,
            run=run_gather,
        ),
        Stage(
            "find_copies",
            title="finds copies of images, exact or near",
            version=2,
            config=config,
            parents=("gather_hashes",),
            plan=plan_find,
            run=run_find,
        ),
        *copies.stages(
            config,
            rows=rows,
            finder="find_copies",
            merger="merge_copies",
            dropper="dedup_image",
            rule=IMAGE_DUPLICATES_RULE,
            title="drops copies; the lowest key of each image stays",
        ),
    ]
