"""Stage filter_image: drops images that are too small, too long or in an evaluation set; hashes the rest."""

import dataclasses
import functools
import math
import os
from dataclasses import dataclass

import numpy as np
import polars as pl

from data_prep import decontamination
from data_prep.accounting.histograms import histogram
from data_prep.accounting.judged import JudgedFacts, publish_judged
from data_prep.corpus_facts import exemptions, guard_paths
from data_prep.download.stage import partition_of
from data_prep.rules import image as image_rules
from data_prep.rules.copies import MarkedImages, Marks, marks_of
from data_prep.rules.image_signature import SIGNATURE_BYTES
from data_prep.sources.table import EXEMPT_COLUMN
from pipeline.core import store
from pipeline.core.evaluation_sets import EvaluationSet, evaluations_of
from pipeline.core.facts import Facts
from pipeline.core.failures import PARTITION_FAILED
from pipeline.core.files.images import UNDECODABLE, BadImageError, decode_upright
from pipeline.core.shard_format import ByteRangePool
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task, repair_remedy

_NO_MARKS = Marks(bytes(image_rules.HASH_BITS // 8), bytes(SIGNATURE_BYTES))  # of images that do not decode


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterImageConfig:
    """`[filter_image]`."""

    min_side_px: int = 16
    """Smallest shorter side of the original image, in pixels."""
    max_aspect: float = 5.0
    """Largest ratio of the longer side to the shorter side."""
    remove_evaluation_copies: bool = True
    """Whether images of the evaluation sets are removed whatever their address (paper, 2.2)."""
    evaluation_distance: int = 32
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
    tasks: dict[str, Task] = {}
    tables = {
        partition_of(shard.path): shard
        for shard in context.parents["download"].shards
        if shard.path.startswith("pictures/") and shard.path.endswith(".parquet")
    }
    for shard in context.parents["download"].shards:
        if not shard.path.endswith(".tar"):
            continue
        name = partition_of(shard.path)
        if name not in tasks:
            inputs = {**shared, "pictures": shard.digest, "rows": tables[name].digest}
            asked = ImageTask(tar=shard.path, table=tables[name].path)
            tasks[name] = Task(name, inputs, asked.to_json())
        else:  # a later pass of the download has added images
            inputs = {**tasks[name].inputs, f"pictures {shard.path}": shard.digest}
            tasks[name] = dataclasses.replace(tasks[name], inputs=inputs)
    return list(tasks.values())


def run(config: FilterImageConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Judge one partition's images; they stay in their tar, and the table says which are kept."""
    asked = ImageTask.from_json(task.arguments)
    table = pl.read_parquet(context.path_in("download", asked.table))
    if "tar" not in table.columns:
        table = table.with_columns(tar=pl.lit(asked.tar))
    exempt_from = exemptions(context.parents["corpus"])
    reasons: list[str | None] = []
    marks: list[Marks] = []
    with ByteRangePool(
        lambda name: context.path_in("download", name), remedy=repair_remedy("download")
    ) as tars:
        own = pl.col(EXEMPT_COLUMN) if EXEMPT_COLUMN in table.columns else pl.lit(None).alias(EXEMPT_COLUMN)
        for tar, offset, size, width, height, key, source, own_rules in table.select(
            "tar", "offset_bytes", "size_bytes", "width_px", "height_px", "key", "source", own
        ).iter_rows():
            data = tars.read(tar, offset, size, f"{key}.jpg")
            try:
                image = decode_upright(data, max_pixels=width * height)
            except BadImageError:
                reasons.append(UNDECODABLE)
                marks.append(_NO_MARKS)
                continue
            exempt = (*exempt_from.get(source, ()), *(own_rules or "").split(","))
            reasons.append(
                image_rules.size(
                    width,
                    height,
                    1 if image_rules.SIZE_RULE in exempt else config.min_side_px,
                    math.inf if image_rules.ASPECT_RULE in exempt else config.max_aspect,
                )
            )
            marks.append(marks_of(np.asarray(image)))
    hashes, signatures = [item.perceptual_hash for item in marks], [item.image_signature for item in marks]
    details: list[str | None] = [None] * len(marks)
    if config.remove_evaluation_copies:
        names, references = _references(
            tuple(evaluations_of(context)),
            tuple(guard_paths(context.parents["corpus"])),
            tuple(
                digest for label, digest in task.inputs.items() if label.startswith(("evaluation ", "guard "))
            ),
        )
        copies = references.nearest_copies(hashes, signatures, config.evaluation_distance)
        for row, reference, bits in zip(*copies, strict=True):
            if reasons[row] is None:
                reasons[row] = image_rules.EVALUATION_IMAGE
                details[row] = f"{names[reference]} ({bits} bits)"
    judged = table.with_columns(
        pl.Series("perceptual_hash", hashes, dtype=pl.Binary),
        pl.Series("image_signature", signatures, dtype=pl.Binary),
        pl.Series("reason", [None if reason is None else str(reason) for reason in reasons], dtype=pl.String),
        pl.Series("detail", details, dtype=pl.String),
    )
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
    asked = ImageTask.from_json(task.arguments)
    table = pl.read_parquet(context.path_in("download", asked.table))
    if "tar" not in table.columns:
        table = table.with_columns(tar=pl.lit(asked.tar))
    dropped = table.with_columns(reason=pl.lit(str(PARTITION_FAILED)), detail=pl.lit(None, dtype=pl.String))
    marks = pl.lit(None, dtype=pl.Binary)
    kept = table.clear().with_columns(perceptual_hash=marks, image_signature=marks)
    return publish_judged(context, task, kept, dropped, JudgedFacts(rules=image_rules.VERSIONS))


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
        version=2,
        config=config,
        parents=("corpus", "download"),
        plan=plan,
        run=run,
        set_aside=set_aside,
    )
