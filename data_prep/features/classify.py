"""Stages classify and filter_classes: scores of image features by any classifier, and thresholds on them.

A classifier is a head over the features of `[image_features]`: unsafe, watermark, aesthetic, or what a user
has trained. `classify` drops nothing, so other thresholds rerun only `filter_classes`, which reads numbers.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import polars as pl
from annotated_types import Ge
from pydantic import AfterValidator

from data_prep.accounting.drop_table import DETAIL
from data_prep.accounting.judged import JudgedFacts, publish_judged
from data_prep.corpus_facts import RowsTask, is_exempt, kept_tables, rows_stage, table_name
from data_prep.features.stage import digests_of_features, read_features, table_name_of
from data_prep.formats.parquet import write_table
from data_prep.rules.image import CLASSIFIERS_RULE
from pipeline.core.arrays import Float32Array
from pipeline.core.config import NOT_IN_DIGEST
from pipeline.core.records import InputError
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

REASON = "classifier"  # of a drop, with the classifier's name after a colon


def column_of(name: str) -> str:
    """Return the sidecar's column with the scores of a classifier."""
    return f"{REASON}_{name}"


def _plain_name(name: str) -> str:
    if not (name.isascii() and name.isidentifier()):
        raise ValueError(f"{name!r} is no name: give letters, digits and _, as in nsfw")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierSource:
    """`[[classifier]]`: a head over the features, and the scores to drop."""

    name: Annotated[str, AfterValidator(_plain_name)]
    """Name in the sidecar's column (`classifier_NAME`) and in the drop reason."""
    weights: str
    """An ONNX file, or linear layers in safetensors, a `torch.save` file or TorchScript. No code of a file
    runs, since only its tensors are read.
    """
    activation: Literal["none", "relu", "gelu"] = "none"
    """What comes between the linear layers of a file of tensors."""
    output: Literal["raw", "sigmoid", "softmax"] = "raw"
    """What becomes of the numbers that the head gives."""
    index: Annotated[int, Ge(0)] = 0
    """Which of them is the score, if there are several."""
    min_score: float | None = None
    """Lowest score to keep. Unset: any."""
    max_score: float | None = None
    """Highest score to keep. Unset: any."""

    def __post_init__(self) -> None:
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise ValueError(f"min_score {self.min_score} is above max_score {self.max_score}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What the scores of a classifier depend on, besides the weights' digest."""

    name: str
    weights: str = field(metadata=NOT_IN_DIGEST)
    activation: Literal["none", "relu", "gelu"]
    output: Literal["raw", "sigmoid", "softmax"]
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The scores of a classifier to keep."""

    name: str
    min_score: float | None
    max_score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyConfig:
    """The heads, in order."""

    heads: tuple[Head, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterClassesConfig:
    """The limits, in order; the first that a row breaks gives the reason."""

    limits: tuple[Limits, ...]


class LoadedHead(Protocol):
    """Returns one score for each feature: float32 [N] from unit-norm float32 [N, dim]."""

    def __call__(self, feature_ND: Float32Array, /) -> Float32Array: ...


def plan(config: ClassifyConfig, context: Context, identify: Callable[[Head], str]) -> list[Task]:
    """Plan one task for each table of rows, bound to its features and to the weights."""
    weights = {f"weights {head.name}": identify(head) for head in config.heads}
    features = digests_of_features(context)
    return [
        Task(
            table_name(table),
            {"rows": table.digest, **features[table_name(table)], **weights},
            RowsTask(table=table.path).to_json(),
        )
        for table in kept_tables(context, rows_stage(context))
    ]


def run(
    config: ClassifyConfig,
    context: Context,
    task: Task,
    progress: Progress,
    load: Callable[[Head], LoadedHead],
) -> Outcome:
    """Write `scores/<table>.parquet`: key, and the scores of each classifier (Float32)."""
    table = RowsTask.from_json(task.arguments).table
    rows = pl.read_parquet(context.path_in(rows_stage(context), table), columns=["key"])
    feature_ND = read_features(context, table_name_of(table), rows["key"])
    scores = dict[str, pl.Series]()
    for head in config.heads:
        score_N = load(head)(feature_ND) if rows.height else np.zeros(0, np.float32)
        if not np.isfinite(score_N).all():
            raise InputError(f"{head.weights}: classifier {head.name} gives a score that is not finite")
        scores[column_of(head.name)] = pl.Series(score_N, dtype=pl.Float32)
    path = f"scores/{table_name_of(table)}.parquet"
    write_table(rows.with_columns(**scores), context.path(path))
    return Outcome({path: rows.height}, num_in=rows.height, num_kept=rows.height)


def plan_filter(config: FilterClassesConfig, context: Context) -> list[Task]:
    """Plan one task for each table of rows."""
    scores = {shard.path: shard.digest for shard in context.parents["classify"].shards}
    return [
        Task(
            table_name(table),
            {"rows": table.digest, "scores": scores[f"scores/{table_name(table)}.parquet"]},
            RowsTask(table=table.path).to_json(),
        )
        for table in kept_tables(context, rows_stage(context))
    ]


def run_filter(config: FilterClassesConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Drop the rows of one table that a limit is broken by; all carry their scores."""
    table = RowsTask.from_json(task.arguments).table
    rows = pl.read_parquet(context.path_in(rows_stage(context), table))
    scores = pl.read_parquet(context.path_in("classify", f"scores/{table_name_of(table)}.parquet"))
    if not rows["key"].equals(scores["key"]):
        raise InputError(
            f"{context.path_in('classify')}: scores of other rows; run `--stage classify --redo`"
        )
    exempt = is_exempt(context.parents["corpus"], CLASSIFIERS_RULE, rows.columns)
    reasons, details = [pl.lit(None, pl.String)], [pl.lit(None, pl.String)]
    for limit in config.limits:
        score = pl.col(column_of(limit.name))
        for broken, said in _broken(score, limit):
            reasons.insert(-1, pl.when(broken).then(pl.lit(f"{REASON}:{limit.name}")))
            details.insert(-1, pl.when(broken).then(pl.format("{} " + said, score.round(4))))
    judged = (
        rows.drop(scores.columns[1:], strict=False)
        .with_columns(*scores.drop("key").get_columns())
        .with_columns(
            reason=pl.when(~exempt).then(pl.coalesce(reasons)),
            **{DETAIL: pl.when(~exempt).then(pl.coalesce(details))},
        )
    )
    kept = judged.filter(pl.col("reason").is_null()).drop("reason", DETAIL)
    dropped = judged.filter(pl.col("reason").is_not_null())
    return publish_judged(context, task, kept, dropped, JudgedFacts(rules={CLASSIFIERS_RULE: 1}))


def _broken(score: pl.Expr, limit: Limits) -> list[tuple[pl.Expr, str]]:
    """Return whether each of a classifier's limits is broken, and how a detail says it."""
    found = []
    if limit.min_score is not None:
        found.append((score < pl.lit(limit.min_score, pl.Float32), f"< {limit.min_score}"))
    if limit.max_score is not None:
        found.append((score > pl.lit(limit.max_score, pl.Float32), f"> {limit.max_score}"))
    return found


def stages(
    sources: Sequence[ClassifierSource],
    *,
    rows: str,
    identify: Callable[[Any], str],
    load: Callable[[Any], LoadedHead],
) -> list[Stage]:
    """Return the stages that classify the images that the stage `rows` kept, and drop some."""
    heads = tuple(
        Head(
            name=item.name,
            weights=item.weights,
            activation=item.activation,
            output=item.output,
            index=item.index,
        )
        for item in sources
    )
    limits = tuple(
        Limits(name=item.name, min_score=item.min_score, max_score=item.max_score) for item in sources
    )
    return [
        Stage(
            "classify",
            title="scores of the images by classifiers",
            version=1,
            config=ClassifyConfig(heads=heads),
            parents=("corpus", rows, "image_features"),
            plan=functools.partial(plan, identify=identify),
            run=functools.partial(run, load=load),
        ),
        Stage(
            "filter_classes",
            title="drops images by the scores of classifiers",
            version=1,
            config=FilterClassesConfig(limits=limits),
            parents=("corpus", rows, "classify"),
            plan=plan_filter,
            run=run_filter,
        ),
    ]
