"""Stage filter_image: drops images that are too small, too long or in an evaluation set.

It reads tables only: the download has measured and hashed the images while their pixels were in hand.
"""

import functools
import os
from dataclasses import dataclass
from typing import Annotated

import polars as pl
from annotated_types import Ge, Le

from data_prep import decontamination
from data_prep.accounting.histograms import histogram
from data_prep.accounting.judged import JudgedFacts, publish_judged
from data_prep.corpus_facts import guard_paths, is_exempt
from data_prep.download.stage import partition_of
from data_prep.rules import image as image_rules
from data_prep.rules.copies import MarkedImages, Marks
from pipeline.core import store
from pipeline.core.evaluation_sets import EvaluationSet, evaluations_of
from pipeline.core.facts import Facts
from pipeline.core.failures import PARTITION_FAILED
from pipeline.core.records import Shard
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterImageConfig:
    """`[filter_image]`."""

    min_side_px: Annotated[int, Ge(1)] = 16
    """Smallest shorter side of the original image, in pixels."""
    max_aspect: Annotated[float, Ge(1)] = 5.0
    """Largest ratio of the longer side to the shorter side."""
    remove_evaluation_copies: bool = True
    """Whether images of the evaluation sets are removed whatever their address (paper, 2.2)."""
    evaluation_distance: Annotated[int, Ge(0), Le(image_rules.HASH_BITS)] = 32
    """Largest number of differing hash bits (of 384) at which an image may be a copy of an evaluation image;
    the signatures decide. On the demo re-encoded copies differ in 0 to 22 bits, other images in 60 or more.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTask(Facts):
    """A downloaded partition, by its paths in the folder of stage download."""

    tar: str  # of the first pass; rows of later passes name their tar
    table: str


def plan(config: FilterImageConfig, context: Context) -> list[Task]:
    """Plan one task for each downloaded partition."""
    evaluations = evaluations_of(context) if config.remove_evaluation_copies else []
    shared = {f"evaluation {item.name}": item.digest for item in evaluations}
    if config.remove_evaluation_copies:
        shared |= {
            f"guard {path}": store.digest_file(path) for path in guard_paths(context.parents["corpus"])
        }
    first_tars: dict[str, Shard] = {}
    tables: dict[str, Shard] = {}
    for shard in context.parents["download"].shards:
        if shard.path.endswith(".tar"):
            first_tars.setdefault(partition_of(shard.path), shard)
        elif shard.path.startswith("pictures/"):
            tables[partition_of(shard.path)] = shard
    return [
        Task(
            name,
            {**shared, "rows": table.digest},
            ImageTask(tar=first_tars[name].path, table=table.path).to_json(),
        )
        for name, table in tables.items()
    ]


def run(config: FilterImageConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Judge one partition's images; they stay in their tar, and the table says which are kept."""
    table = _rows(context, ImageTask.from_json(task.arguments))
    corpus, names = context.parents["corpus"], table.columns
    reason = image_rules.size(
        pl.when(is_exempt(corpus, image_rules.SIZE_RULE, names)).then(1).otherwise(config.min_side_px),
        pl.when(is_exempt(corpus, image_rules.ASPECT_RULE, names))
        .then(float("inf"))
        .otherwise(config.max_aspect),
    )
    judged = table.with_columns(reason=reason, detail=pl.lit(None, pl.String))
    if config.remove_evaluation_copies:
        judged = _without_evaluation_images(config, context, task, judged)
    kept = judged.filter(pl.col("reason").is_null()).drop("reason", "detail")
    dropped = judged.filter(pl.col("reason").is_not_null())
    short_side = [
        rows.select(pl.min_horizontal("width_px", "height_px")).to_series() for rows in (kept, dropped)
    ]
    facts = JudgedFacts(
        rules=image_rules.VERSIONS,
        histograms={"short_side_px": histogram("short_side_px", *short_side)},
    )
    return publish_judged(context, task, kept, dropped, facts)


def set_aside(config: FilterImageConfig, context: Context, task: Task) -> Outcome:
    """Drop the rows of a partition as `partition_failed`."""
    table = _rows(context, ImageTask.from_json(task.arguments))
    dropped = table.with_columns(reason=pl.lit(str(PARTITION_FAILED)), detail=pl.lit(None, pl.String))
    return publish_judged(context, task, table.clear(), dropped, JudgedFacts(rules=image_rules.VERSIONS))


def _rows(context: Context, asked: ImageTask) -> pl.DataFrame:
    table = pl.read_parquet(context.path_in("download", asked.table))
    return table if "tar" in table.columns else table.with_columns(tar=pl.lit(asked.tar))


def _without_evaluation_images(
    config: FilterImageConfig, context: Context, task: Task, judged: pl.DataFrame
) -> pl.DataFrame:
    """Return the rows with reason and detail of those whose image is a copy of an evaluation image."""
    names, references = _references(
        tuple(evaluations_of(context)),
        tuple(guard_paths(context.parents["corpus"])),
        tuple(digest for label, digest in task.inputs.items() if label.startswith(("evaluation ", "guard "))),
    )
    hashes, signatures = (judged[name].to_list() for name in Marks._fields)
    copies = references.nearest_copies(hashes, signatures, config.evaluation_distance)
    found = pl.DataFrame(
        {
            "at": pl.Series(copies.place, dtype=pl.UInt32),
            "copy_of": [
                f"{names[reference]} ({bits} bits)"
                for reference, bits in zip(copies.other, copies.bits, strict=True)
            ],
        },
        schema={"at": pl.UInt32, "copy_of": pl.String},
    )
    rows = judged.with_row_index("at").join(found, on="at", how="left", maintain_order="left")
    is_copy = pl.col("reason").is_null() & pl.col("copy_of").is_not_null()
    return rows.with_columns(
        reason=pl.when(is_copy).then(pl.lit(str(image_rules.EVALUATION_IMAGE))).otherwise("reason"),
        detail=pl.when(is_copy).then("copy_of"),
    ).drop("at", "copy_of")


@functools.lru_cache(maxsize=1)  # the sets are the same for every task that a process does
def _references(
    evaluations: tuple[EvaluationSet, ...], guards: tuple[str, ...], digests: tuple[str, ...]
) -> tuple[list[str], MarkedImages]:
    """Return names (`<set>: <id>`) and marks of all evaluation images.

    Raises:
        InputError: if a line is not an image; it names the line.
    """
    names, marks = [], []
    for evaluation in evaluations:
        for name, item in decontamination.set_marks(evaluation.folder, evaluation.name):
            names.append(f"{evaluation.name}: {name}")
            marks.append(item)
    for path in guards:
        for name, item in decontamination.guarded_marks(path):
            names.append(f"{os.path.basename(path)}: {name}")
            marks.append(item)
    return names, MarkedImages(
        [item.perceptual_hash for item in marks], [item.image_signature for item in marks]
    )


def stage(config: FilterImageConfig) -> Stage:
    """Return the stage that judges the downloaded images."""
    return Stage(
        "filter_image",
        title="size, aspect, copies of evaluation images",
        version=3,
        config=config,
        parents=("corpus", "download"),
        plan=plan,
        run=run,
        set_aside=set_aside,
    )
