"""Stage split: sets images aside for validation so that no copy of one remains in training.

A digest of the perceptual hash (of the bytes if no hash is recorded) ranks the images: all rows of one image,
and its copies with the same hash, are adjacent, and the order depends on neither partitions nor workers. The
first in rank become validation, except those that have a near copy (a hash within `distance` bits, and a
signature that matches) among the training rows. So no row is dropped, and two copies are never on different
sides of the split.
"""

import collections
import concurrent.futures
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import polars as pl
import polars_hash as plh
from annotated_types import Ge, Gt, Lt

from data_prep.corpus_facts import kept_tables, rows_stage
from data_prep.formats.parquet import write_table
from data_prep.rules.copies import MarkedImages
from data_prep.rules.image import HASH_BITS
from pipeline.core.facts import Facts
from pipeline.core.records import InputError, Shard, too_few
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

KEYS_FILE = "validation.parquet"

_RANK_HEX_DIGITS = 32
# Candidates for each requested row: the surplus replaces candidates with near copies elsewhere.
_CANDIDATES_PER_ROW = 4
_SPARE_CANDIDATES = 1000
_READ_AHEAD = 16  # tables of some 10,000 rows


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """`[split]`: set rows aside for validation; without this table all rows are for training. Give `share` or
    `count`.
    """

    share: Annotated[float, Gt(0), Lt(1)] | None = None
    """Share of all kept rows to set aside."""
    count: Annotated[int, Ge(1)] | None = None
    """Largest number of rows to set aside; the rows of one image stay together."""
    distance: Annotated[int, Ge(0), Lt(HASH_BITS)] = 32
    """Largest number of differing hash bits (of 384) at which two images count as copies if their signatures
    match; 0: only equal hashes do. On the demo re-encoded copies differ in 0 to 22 bits, other images in 60
    or more.
    """

    def __post_init__(self) -> None:
        if (self.share is None) == (self.count is None):
            raise ValueError("give either share or count")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFacts(Facts):
    """The requested and the actual number of validation rows, and their distribution over the tables."""

    asked: int
    validation: int
    candidates_with_copies_in_training: int
    counts: Mapping[str, int]  # table of kept rows → validation rows in it


def plan(config: SplitConfig, context: Context) -> list[Task]:
    """Plan one task, because an image's copies may be in any partition."""
    return [Task("split", {shard.path: shard.digest for shard in _kept(context)})]


def run(config: SplitConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write the sorted keys of the validation rows; memory grows with their number, not with the corpus."""
    kept = _kept(context)
    total = sum(shard.num_samples for shard in kept)
    wanted = config.count if config.count is not None else int(total * (config.share or 0))
    if not 0 < wanted < total:
        found = f"{context.path()}: cannot set aside {wanted} of {total} rows"
        raise too_few(InputError(f"{found}; correct [split] share or count"), total)
    candidates = _first_in_rank(context, kept, wanted * _CANDIDATES_PER_ROW + _SPARE_CANDIDATES)
    images = (
        candidates.group_by("rank", "perceptual_hash")
        .agg(num_rows=pl.len(), signatures=pl.col("image_signature").unique(maintain_order=True))
        .sort("rank")
    )
    beside_training = _near_training(config, context, kept, images, progress)
    chosen = _choose(config, images, beside_training, wanted)
    keys = candidates.join(chosen.select("rank"), on="rank", how="semi").sort("key")
    if keys.height == 0:
        found = (
            f"{context.path()}: all {images.height} candidate images have near copies that would remain in"
            f" training; lower [split] distance or raise its share or count"
        )
        raise too_few(InputError(found), total)
    write_table(keys.select("key"), context.path(KEYS_FILE))
    by_table = dict(keys.group_by("table").len().sort("table").iter_rows())
    facts = SplitFacts(
        asked=wanted,
        validation=keys.height,
        candidates_with_copies_in_training=int(beside_training.sum()),
        counts={kept[number].path: count for number, count in by_table.items()},
    )
    return Outcome({KEYS_FILE: keys.height}, num_in=total, num_kept=total, extra=facts.to_json())


def counts(context: Context) -> Mapping[str, int]:
    """Return table of kept rows → validation rows in it."""
    return SplitFacts.from_json(context.parents["split"].extra["split"]).counts


def _kept(context: Context) -> list[Shard]:
    return kept_tables(context, rows_stage(context))


def _ranked(context: Context, shard: Shard) -> pl.LazyFrame:
    identity = pl.coalesce(pl.col("perceptual_hash").bin.encode("hex"), "image_sha256")
    frame = pl.scan_parquet(context.path_in(rows_stage(context), shard.path))
    return (
        frame.select("key", "perceptual_hash", "image_signature", "image_sha256")
        .with_columns(_identity=identity)
        .with_columns(rank=plh.col("_identity").chash.sha2_256().str.slice(0, _RANK_HEX_DIGITS))
        .select("key", "rank", "perceptual_hash", "image_signature")
    )


def _collected(frames: Iterable[pl.LazyFrame]) -> Iterator[pl.DataFrame]:
    """Yield the rows of tables in order, with some read ahead: an object store answers after some 20 ms."""
    with concurrent.futures.ThreadPoolExecutor(_READ_AHEAD) as pool:
        coming = collections.deque[concurrent.futures.Future[pl.DataFrame]]()
        for frame in frames:
            coming.append(pool.submit(frame.collect, engine="streaming"))
            if len(coming) == _READ_AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _first_in_rank(context: Context, kept: list[Shard], limit: int) -> pl.DataFrame:
    """Return at most `limit` rows (key, rank, hash, signature, table) of the images first in rank.

    An image whose rows do not all fit is left out, so the result does not depend on the order of tables.
    """
    schema = {
        "key": pl.String, "rank": pl.String, "perceptual_hash": pl.Binary, "image_signature": pl.Binary,
        "table": pl.UInt32,
    }  # fmt: skip
    found = pl.DataFrame(schema=schema)
    border: str | None = None

    def frames() -> Iterator[pl.LazyFrame]:
        for number, shard in enumerate(kept):
            rows = _ranked(context, shard).with_columns(table=pl.lit(number, dtype=pl.UInt32))
            yield rows if border is None else rows.filter(pl.col("rank") < border)

    for rows in _collected(frames()):
        if border is not None:  # it may have moved since the table was asked for
            rows = rows.filter(pl.col("rank") < border)
        found = pl.concat([found, rows]).sort("rank", "key")
        if found.height > limit:
            border = str(found["rank"][limit])
            found = found.filter(pl.col("rank") < border)
    return found


def _near_training(
    config: SplitConfig, context: Context, kept: list[Shard], images: pl.DataFrame, progress: Progress
) -> npt.NDArray[np.bool_]:
    """Return whether each candidate image has a near copy among the other rows, bool [images]."""
    near = np.zeros(images.height, dtype=np.bool_)
    if config.distance == 0 or not (marked := _marked(images)).height:
        return near
    index, image = MarkedImages(*_marks(marked)), marked["image"].to_numpy()
    is_copied = np.zeros(marked.height, dtype=np.bool_)
    border = images["rank"][-1]  # images after it in rank are not candidates
    others = (
        _ranked(context, shard)
        .filter(pl.col("rank") > border, pl.col("perceptual_hash").is_not_null())
        .select("perceptual_hash", "image_signature")
        .unique()
        for shard in kept
    )
    for number, rows in enumerate(_collected(others), start=1):
        index.mark_copied(is_copied, *_marks(rows), config.distance)
        near[image[is_copied]] = True
        is_copied = near[image]  # any of an image's signatures may match
        progress(number, len(kept), "tables compared")
    return near


def _choose(
    config: SplitConfig, images: pl.DataFrame, beside_training: npt.NDArray[np.bool_], wanted: int
) -> pl.DataFrame:
    """Choose the images to set aside in rank, whole groups of near copies, with at most `wanted` rows."""
    groups = np.arange(images.height)
    if config.distance and (marked := _marked(images)).height:
        groups = _groups_of_copies(images, marked, config.distance)
    numbered = images.with_row_index("place").with_columns(
        group=pl.Series(groups), refused=pl.Series(beside_training)
    )
    by_group = (
        numbered.group_by("group")
        .agg(pl.col("num_rows").sum(), pl.col("refused").any(), pl.col("place").min())
        .filter(~pl.col("refused"))
        .sort("place")
    )
    accepted, room = [], wanted
    for group, num_rows in by_group.select("group", "num_rows").iter_rows():
        if num_rows <= room:  # skip a group that is too large, so that smaller ones fill the rest
            accepted.append(group)
            room -= num_rows
        if not room:
            break
    return numbered.filter(pl.col("group").is_in(accepted))


def _groups_of_copies(images: pl.DataFrame, marked: pl.DataFrame, distance: int) -> npt.NDArray[np.int64]:
    """Return the group of each candidate image, int64 [images]; near copies of near copies share a group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    image = marked["image"].to_numpy()
    pairs = [
        (image[copies.place], image[copies.other])
        for copies in MarkedImages(*_marks(marked)).copies_among(distance)
    ]
    left, right = (np.concatenate(side) for side in zip(*pairs, strict=True))
    size = (images.height, images.height)
    _, groups = connected_components(coo_array((np.ones(len(left)), (left, right)), shape=size))
    found: npt.NDArray[np.int64] = groups.astype(np.int64)
    return found


def _marked(images: pl.DataFrame) -> pl.DataFrame:
    """Return the signatures of the images that have a hash, with `image`, the index of the image."""
    placed = images.with_row_index("image").filter(pl.col("perceptual_hash").is_not_null())
    return placed.select("image", "perceptual_hash", image_signature="signatures").explode("image_signature")


def _marks(rows: pl.DataFrame) -> tuple[list[bytes], list[bytes]]:
    return rows["perceptual_hash"].to_list(), rows["image_signature"].to_list()


def stage(config: SplitConfig, *, rows: str) -> Stage:
    """Return the stage that sets rows aside for validation."""
    return Stage(
        "split",
        title="images set aside for validation, with all their copies",
        version=2,
        config=config,
        parents=(rows,),
        plan=plan,
        run=run,
    )
