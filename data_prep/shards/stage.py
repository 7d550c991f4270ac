"""Stage shards: tars with sidecars in the corpus's order, which training reads.

Each tar holds `{key}.jpg` and `{key}.txt` for each sample. With `samples_per_shard` the images are packed
anew, and all tars except the last have that number of samples. Otherwise the tars of the download are the
shards, and no image is read or written again: docs/scale.md, "Where the bytes go".

The sidecar (Parquet, rows in tar order) holds key, offset_bytes, size_bytes (of the image), caption, source,
url, score, width_px, height_px (as downloaded from the web), image_sha256 (of the stored bytes),
perceptual_hash, and the columns that sources carry.

If a run has `[split]`, stage shards packs the training rows, and stage validation packs the rows that stage
split set aside, in the same way, into a separate folder with a separate manifest.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import polars as pl
from annotated_types import Ge

from data_prep.accounting.judged import JudgedFacts
from data_prep.corpus_facts import kept_tables, rows_stage, table_name
from data_prep.download.stage import partition_of
from data_prep.formats.shards import Part, Piece, ShardTask, Whole, adopt_shard, cut, write_shard
from data_prep.shards import split
from pipeline.core.records import Shard
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsConfig:
    """`[shards]`."""

    samples_per_shard: Annotated[int, Ge(1)] | None = None
    """Samples in each shard, for which every image is read and written once more; 10,000 take about 300 MB
    at 256 pixels. Unset: each partition of the download is a shard; its sidecar lists the kept samples, and
    the tar may have others.
    """


# A partition of which later stages keep a smaller share is packed anew: docs/scale.md, "Where the bytes go".
_LEAST_KEPT = 0.5
_SAMPLES_OF_VALIDATION = 10_000  # in a shard, if no number is set


def plan(config: ShardsConfig, context: Context, part: Part = "train") -> list[Task]:
    """Plan one task per shard: samples number*n to (number+1)*n of this part's kept samples, in order.

    Without a number of samples there is a shard for each partition that has any, named as the partition.
    """
    kept = kept_tables(context, rows_stage(context))
    digests = {shard.path: {shard.path: shard.digest} for shard in kept}
    partitions = {partition_of(shard.path): digests[shard.path] for shard in kept}
    for shard in context.parents["download"].shards:
        if shard.path.endswith(".tar"):
            name = shard.path.removeprefix("pictures/").removesuffix(".tar")
            partitions[partition_of(shard.path)][f"pictures {name}"] = shard.digest
    own_part: Part | None = None
    chosen = {}
    if "split" in context.parents:
        kept = _part_of(kept, split.counts(context), part)
        own_part = part
        chosen = {"validation keys": context.shards_of("split", split.KEYS_FILE)[0].digest}
    per_shard = config.samples_per_shard
    if per_shard is None and part == "train":
        return _plan_partitions(context, kept, partitions, chosen, own_part)
    tasks = []
    for number, pieces in enumerate(cut(kept, per_shard or _SAMPLES_OF_VALIDATION)):
        inputs = {label: digest for piece in pieces for label, digest in digests[piece.table].items()}
        tasks.append(
            Task(f"{number:05d}", {**inputs, **chosen}, ShardTask(pieces=pieces, part=own_part).to_json())
        )
    return tasks


def _plan_partitions(
    context: Context,
    kept: list[Shard],
    inputs: Mapping[str, Mapping[str, str]],
    chosen: Mapping[str, str],
    part: Part | None,
) -> list[Task]:
    """Plan a shard for each partition; those that cannot stay as they are get packed."""
    tars: dict[str, list[Shard]] = {}
    for shard in context.parents["download"].shards:
        if shard.path.endswith(".tar"):
            tars.setdefault(partition_of(shard.path), []).append(shard)
    scored = context.parents.get("filter_score")
    judged = {} if scored is None else scored.extra
    tasks = []
    for table in kept:
        if not table.num_samples:
            continue
        name = partition_of(table.path)
        first, *later = tars[name]
        lost_captions = JudgedFacts.from_json(judged.get(table_name(table), {})).captions_dropped
        # The tar has each sample's caption, which a threshold on scores may replace, and no image that a
        # later pass of the download brought.
        stays = not later and not lost_captions and table.num_samples >= _LEAST_KEPT * first.num_samples
        asked = ShardTask(
            pieces=[Piece(table=table.path, first=0, count=table.num_samples)],
            part=part,
            whole=Whole(tar=first.path, digest=first.digest, num_samples=first.num_samples)
            if stays
            else None,
        )
        tasks.append(Task(name, {**inputs[name], **chosen}, asked.to_json()))
    return tasks


def run(config: ShardsConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Pack one shard, or take over a tar of the download."""
    asked = ShardTask.from_json(task.arguments)
    rows = pl.concat(
        [_rows(context, piece.table, asked.part).slice(piece.first, piece.count) for piece in asked.pieces],
        how="diagonal",
    ).collect()
    if asked.whole is not None:
        tar = context.path_in("download", asked.whole.tar)
        return adopt_shard(context, task.name, rows, asked.whole, tar)
    return write_shard(context, task.name, rows, lambda tar: context.path_in("download", tar))


def _rows(context: Context, table: str, part: Part | None) -> pl.LazyFrame:
    rows = pl.scan_parquet(context.path_in(rows_stage(context), table))
    if part is None:
        return rows
    validation = pl.scan_parquet(context.path_in("split", split.KEYS_FILE))
    how: Literal["semi", "anti"] = "semi" if part == "validation" else "anti"
    return rows.join(validation, on="key", how=how, maintain_order="left")


def _part_of(kept: list[Shard], num_validation: Mapping[str, int], part: Part) -> list[Shard]:
    """Return the tables with this part's number of rows in each."""
    return [
        Shard(
            shard.path,
            count if part == "validation" else shard.num_samples - count,
            shard.num_bytes,
            shard.digest,
        )
        for shard in kept
        for count in [num_validation.get(shard.path, 0)]
    ]


def stage(config: ShardsConfig, *, rows: str, has_scores: bool, has_split: bool) -> Stage:
    """Return the stage that packs the rows that the stage `rows` kept; with a split, only training rows.

    With `has_scores`, it asks the stage filter_score, which need not be the last one, whose captions it took.
    """
    scores = ("filter_score",) if has_scores and rows != "filter_score" else ()
    return Stage(
        "shards",
        title="tar shards with a Parquet sidecar: what training reads",
        version=1,
        config=config,
        parents=("download", *scores, rows, *(("split",) if has_split else ())),
        plan=plan,
        run=run,
    )


def validation_stage(config: ShardsConfig, *, rows: str) -> Stage:
    """Return the stage that packs the rows that stage split set aside."""
    return Stage(
        "validation",
        title="tar shards of the rows set aside: training never reads them",
        version=1,
        config=config,
        parents=("download", rows, "split"),
        plan=functools.partial(plan, part="validation"),
        run=run,
    )
