"""Stages score and filter_score: the cosine of image and caption, and the threshold on it (section 2.2).

Scoring is a separate stage that drops nothing: another threshold reruns only `filter_score`, which just reads
numbers. The caller provides the encoders (`pipeline.catalog`): Multilingual-CLIP with its CLIP, or a model
that a run has trained. Scores carry the digests of both encoders, so that one threshold never applies to
scores of different pairs.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
import polars as pl
from annotated_types import Ge, Gt, Le, Lt

from data_prep.accounting.drop_table import DETAIL
from data_prep.accounting.histograms import histogram
from data_prep.accounting.judged import JudgedFacts, publish_judged
from data_prep.corpus_facts import is_exempt, keeps_captions, kept_tables, rows_stage, table_name
from data_prep.download.stage import partition_of
from data_prep.features.stage import FeaturesFacts, digests_of_features, read_features
from data_prep.formats.parquet import write_table
from data_prep.rules.text import SCORE_BELOW_THRESHOLD, SCORE_RULE
from pipeline.core.arrays import Float32Array
from pipeline.core.config import NOT_IN_DIGEST
from pipeline.core.facts import Facts
from pipeline.core.records import ConfigError, InputError, Manifest
from pipeline.core.shard_format import ByteRangePool, all_captions
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task, repair_remedy

# Of the sidecars; `data_prep.sources.table.score_pairs` reads them if a sidecar is a source.
SCORE_COLUMN, TEXT_COLUMN, IMAGE_COLUMN = "pair_score", "pair_text_encoder", "pair_image_encoder"
SCORES_COLUMN = all_captions(SCORE_COLUMN)  # of a row's captions, if it keeps several; pair_score: the best
_PAIR_COLUMNS = (SCORE_COLUMN, SCORES_COLUMN, TEXT_COLUMN, IMAGE_COLUMN)
_CAPTIONS = all_captions("caption")
_ROWS_AT_ONCE = 2048  # images in memory; captions are sorted by length among them
_DIGEST_DIGITS = 16
_PAPERS_MIN_SCORE = 0.26
_STEPS_PER_UNIT = 500  # of the counts from which a share is computed


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """`[score]`: which encoders score, and which rows. Give text_encoder and image_encoder, or model.

    Paths and the device stay out of the digest, because the digests of the encoders bind the scores.
    """

    text_encoder: str | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Multilingual-CLIP text tower: a folder or a model id."""
    image_encoder: str | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Weights of the CLIP model that the text tower belongs to."""
    image_activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of that CLIP model: `quick_gelu` for OpenAI's, `gelu` for OpenCLIP's B-16-plus-240."""
    model: str | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Weights of a Chinese CLIP that scores both sides, instead of the two encoders."""
    vocabulary: str | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Vocabulary of `model`. Unset: cnclip looks for it next to the weights and in the usual places."""
    context_length: Annotated[int, Ge(3)] = 52
    """Tokens of a text for `model`, including [CLS] and [SEP]."""
    rows: Literal["unscored", "all"] = "unscored"
    """Which rows are scored: those whose source has no score (paper, 2.2), or all."""
    device: str | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Device as torch names it. Unset: the GPU if there is one."""
    precision: Literal["float32", "bf16"] = field(default="float32", metadata=NOT_IN_DIGEST)
    """Precision of the encoders' matrix products. `bf16` is for GPUs, and keeps some three digits of a score.
    """

    def __post_init__(self) -> None:
        two = (self.text_encoder is not None, self.image_encoder is not None)
        if two != (self.model is None, self.model is None):
            raise ValueError("give text_encoder and image_encoder, or only model")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterScoreConfig:
    """`[filter_score]`: the threshold on the run's scores."""

    min_score: Annotated[float, Ge(-1), Le(1)] | None = None
    """Lowest cosine to keep; 0.26 (paper, 2.2) if neither setting is given. Each pair of encoders has its own
    scale, which the report shows.
    """
    drop_share: Annotated[float, Gt(0), Lt(1)] | None = None
    """Instead of `min_score`: the largest share of the scored rows to drop, lowest scores first. The
    threshold is then a multiple of 0.002.
    """

    def __post_init__(self) -> None:
        if self.min_score is not None and self.drop_share is not None:
            raise ValueError("give min_score or drop_share, not both")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderPair(Facts):
    """Return the first digits of both encoders' digests."""

    text: str
    image: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTask(Facts):
    """A table in the folder of the stage that kept its rows, who scores it, and the filter's threshold."""

    table: str
    pair: EncoderPair
    min_score: float | None = None
    has_features: bool | None = None  # True: the run has the images' features by the same encoder

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**{**fields, "pair": EncoderPair.from_json(fields["pair"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFacts(Facts):
    """The facts of one scored table."""

    pair: EncoderPair
    scored: int = 0  # rows
    # Rows by score, in steps of 0.002: a share becomes a threshold without reading scores again.
    scores: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        pair = EncoderPair.from_json(fields["pair"])
        return cls(pair=pair, scored=fields.get("scored", 0), scores=fields.get("scores", {}))


class PairScorer(Protocol):
    """Both encoders, loaded; each returns unit-norm float32 features [len, dim] in one common space."""

    def embed_texts(self, texts: Sequence[str]) -> Float32Array: ...

    def embed_images(self, images: Sequence[bytes]) -> Float32Array: ...


def plan(
    config: ScoreConfig, context: Context, identify: Callable[[ScoreConfig], tuple[str, str]]
) -> list[Task]:
    """Plan one task for each partition, bound to the rows, the images and both encoders.

    `identify` gives the digests of both encoders: a score means nothing without them.
    """
    text, image = (digest[:_DIGEST_DIGITS] for digest in identify(config))
    captions = {"captions": "each scored"} if keeps_captions(context.parents["corpus"]) else {}
    images: dict[str, dict[str, str]] = {}  # a partition may have several tars: a retry adds one
    for shard in context.parents["download"].shards:
        if shard.path.endswith(".tar"):
            found = images.setdefault(partition_of(shard.path), {})
            found[f"pictures {shard.path}"] = shard.digest
    features: Mapping[str, Mapping[str, str]] = {}
    stored = context.parents.get("image_features")
    if stored is not None and FeaturesFacts.of(stored).encoder == image:
        features = digests_of_features(context)
    return [
        Task(
            name,
            {
                "rows": shard.digest,
                **captions,
                **images[name],
                **features.get(name, {}),
                "text encoder": text,
                "image encoder": image,
            },
            ScoreTask(
                table=shard.path,
                pair=EncoderPair(text=text, image=image),
                has_features=True if features else None,
            ).to_json(),
        )
        for shard in kept_tables(context, rows_stage(context))
        for name in [table_name(shard)]
    ]


def run(
    config: ScoreConfig,
    context: Context,
    task: Task,
    progress: Progress,
    load: Callable[[ScoreConfig], PairScorer],
) -> Outcome:
    """Write `scores/<partition>.parquet`: key and pair_score (null if the row is not to be scored).

    If a source keeps several captions of a row, pair_scores has the score of each, and pair_score the best.
    """
    asked = ScoreTask.from_json(task.arguments)
    path = context.path_in(rows_stage(context), asked.table)
    columns = ["key", "caption", "score", "tar", "offset_bytes", "size_bytes"]
    # A table may also carry a column of this name along, which is nobody's list of captions.
    has_several = keeps_captions(context.parents["corpus"]) and isinstance(
        pl.scan_parquet(path).collect_schema().get(_CAPTIONS), pl.List
    )
    rows = pl.read_parquet(path, columns=[*columns, *([_CAPTIONS] if has_several else [])])
    captions = pl.concat_list("caption")
    if has_several:
        captions = pl.when(pl.col(_CAPTIONS).list.len() > 0).then(_CAPTIONS).otherwise(captions)
    wanted = pl.lit(True) if config.rows == "all" else pl.col("score").is_null() | pl.col("score").is_nan()
    chosen = rows.with_row_index("at").filter(wanted)
    parts = list[pl.DataFrame]()  # the score of each caption
    if chosen.height:
        encoder = load(config)
        for start in range(0, chosen.height, _ROWS_AT_ONCE):
            part = chosen.slice(start, _ROWS_AT_ONCE)
            if asked.has_features:
                image_ND = read_features(context, task.name, part["key"])
            else:
                image_ND = encoder.embed_images(_images(context, part))
            texts = part.select("at", text=captions).with_row_index("image").explode("text")
            for texts_M in texts.iter_slices(_ROWS_AT_ONCE):
                text_MD = encoder.embed_texts(texts_M["text"].to_list())
                score_M = np.einsum("md,md->m", image_ND[texts_M["image"].to_numpy()], text_MD)
                parts.append(texts_M.select("at", score=pl.Series(score_M, dtype=pl.Float32)))
            progress(start + part.height, chosen.height, "pairs")
    each = pl.concat(parts) if parts else pl.DataFrame(schema={"at": pl.UInt32, "score": pl.Float32})
    if not each["score"].is_finite().all():
        raise InputError(f"{path}: a score is not finite; the weights of [score] give NaN features")
    of_row = each.group_by("at").agg(
        pl.col("score").max().alias(SCORE_COLUMN), pl.col("score").alias(SCORES_COLUMN)
    )
    table = rows.with_row_index("at").join(of_row, on="at", how="left", maintain_order="left")
    several = pl.when(pl.col(_CAPTIONS).list.len() > 0).then(SCORES_COLUMN).alias(SCORES_COLUMN)
    table = table.select("key", SCORE_COLUMN, *([several] if has_several else []))
    found = table[SCORE_COLUMN].drop_nulls().to_numpy()
    out = f"scores/{task.name}.parquet"
    write_table(table, context.path(out))
    facts = ScoreFacts(pair=asked.pair, scored=chosen.height, scores=_counts(found))
    return Outcome({out: rows.height}, num_in=rows.height, num_kept=rows.height, extra=facts.to_json())


def plan_filter(config: FilterScoreConfig, context: Context) -> list[Task]:
    """Plan one task for each partition.

    Raises:
        ConfigError: if the scores come from more than one pair of encoders.
    """
    pairs = {facts.pair for facts in _facts_of(context.parents["score"])}
    if len(pairs) > 1:
        raise ConfigError(
            f"filter_score.min_score: scores of {len(pairs)} different encoder pairs have no threshold in"
            f" common; run `--stage score --redo`"
        )
    pair = next(iter(pairs))
    min_score = threshold(config, context.parents["score"])
    scores = {shard.path: shard.digest for shard in context.parents["score"].shards}
    return [
        Task(
            name,
            {"rows": shard.digest, "scores": scores[f"scores/{name}.parquet"]},
            ScoreTask(table=shard.path, pair=pair, min_score=min_score).to_json(),
        )
        for shard in kept_tables(context, rows_stage(context))
        for name in [table_name(shard)]
    ]


def run_filter(config: FilterScoreConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Drop rows scored below the threshold; the others carry the score and both encoders' digests.

    A row with several captions stays with those that are not below it, and goes if all are.
    """
    asked = ScoreTask.from_json(task.arguments)
    rows = pl.read_parquet(context.path_in(rows_stage(context), asked.table))
    scores = pl.read_parquet(context.path_in("score", f"scores/{task.name}.parquet"))
    if not rows["key"].equals(scores["key"]):
        raise InputError(f"{context.path_in('score')}: scores of other rows; run `--stage score --redo`")
    min_score = asked.min_score
    assert min_score is not None  # plan_filter has set it
    exempt = is_exempt(context.parents["corpus"], SCORE_RULE, rows.columns)
    is_scored = pl.col(SCORE_COLUMN).is_not_null()
    judged = (
        rows.drop(*_PAIR_COLUMNS, strict=False)
        .with_columns(*scores.drop("key").get_columns())
        .with_columns(
            pl.when(is_scored).then(pl.lit(asked.pair.text)).alias(TEXT_COLUMN),
            pl.when(is_scored).then(pl.lit(asked.pair.image)).alias(IMAGE_COLUMN),
            reason=pl.when((pl.col(SCORE_COLUMN) < pl.lit(min_score, dtype=pl.Float32)) & ~exempt).then(
                pl.lit(str(SCORE_BELOW_THRESHOLD))
            ),
        )
    )
    kept = judged.filter(pl.col("reason").is_null()).drop("reason")
    captions_dropped = None
    if SCORES_COLUMN in kept.columns:
        kept, num_lost = _without_low_captions(kept, min_score, exempt)
        captions_dropped = {str(SCORE_BELOW_THRESHOLD): num_lost} if num_lost else {}
    why = pl.format("{} < {}", pl.col(SCORE_COLUMN).round(4), pl.lit(min_score))
    dropped = judged.filter(pl.col("reason").is_not_null()).with_columns(why.alias(DETAIL))
    return publish_judged(
        context,
        task,
        kept,
        dropped,
        JudgedFacts(
            histograms={"pair_score": histogram("pair_score", kept[SCORE_COLUMN], dropped[SCORE_COLUMN])},
            min_score=min_score,
            score_minimums=minimums(judged.filter(~exempt), SCORE_COLUMN),
            captions_dropped=captions_dropped,
        ),
    )


def _without_low_captions(kept: pl.DataFrame, min_score: float, exempt: pl.Expr) -> tuple[pl.DataFrame, int]:
    """Take the captions below the threshold out of rows that keep several, and return how many these were."""
    is_high = pl.col(SCORES_COLUMN) >= pl.lit(min_score, dtype=pl.Float32)
    rows = kept.with_row_index("at").with_columns(_exempt=exempt)
    each = rows.filter(pl.col(SCORES_COLUMN).is_not_null()).select("at", "_exempt", _CAPTIONS, SCORES_COLUMN)
    each = each.explode(_CAPTIONS, SCORES_COLUMN)
    high = each.filter(is_high | pl.col("_exempt"))
    of_row = high.group_by("at").agg(pl.col(_CAPTIONS, SCORES_COLUMN).name.suffix("_high"))
    rows = rows.join(of_row, on="at", how="left", maintain_order="left")
    rows = rows.with_columns(
        pl.coalesce(f"{name}_high", name).alias(name) for name in (_CAPTIONS, SCORES_COLUMN)
    ).with_columns(caption=pl.coalesce(pl.col(f"{_CAPTIONS}_high").list.first(), "caption"))
    return rows.select(kept.columns), each.height - high.height


def threshold(config: FilterScoreConfig, scores: Manifest) -> float:
    """Return the lowest cosine to keep."""
    if config.drop_share is None:
        return _PAPERS_MIN_SCORE if config.min_score is None else config.min_score
    counts: Counter[int] = Counter()
    for facts in _facts_of(scores):
        counts.update({int(step): count for step, count in facts.scores.items()})
    to_drop = config.drop_share * counts.total()
    for step in sorted(counts):
        to_drop -= counts[step]
        if to_drop < 0:
            return step / _STEPS_PER_UNIT
    return -1.0  # nothing was scored


def _facts_of(scores: Manifest) -> list[ScoreFacts]:
    return [ScoreFacts.from_json(extra) for extra in scores.extra.values()]


def _counts(scores_N: Float32Array) -> dict[str, int]:
    """Return step of 0.002 (as text, for a receipt) → number of scores in it, in order."""
    steps, counts = np.unique(np.floor(scores_N * _STEPS_PER_UNIT).astype(int), return_counts=True)
    return {str(step): int(count) for step, count in zip(steps, counts, strict=True)}


def minimums(rows: pl.DataFrame, column: str) -> dict[str, float]:
    """Return source → lowest score with 4 digits, without sources that have no scores."""
    lowest = (
        rows.filter(pl.col(column).is_not_null() & pl.col(column).is_not_nan())
        .group_by("source")
        .agg(pl.col(column).min())
        .sort("source")
    )
    return {source: round(float(score), 4) for source, score in lowest.select("source", column).iter_rows()}


def _images(context: Context, rows: pl.DataFrame) -> list[bytes]:
    """Yield the bytes of the rows' images in order."""
    with ByteRangePool(
        lambda name: context.path_in("download", name), remedy=repair_remedy("download")
    ) as tars:
        places = rows.select("tar", "offset_bytes", "size_bytes", "key").iter_rows()
        return [tars.read(tar, offset, size, f"{key}.jpg") for tar, offset, size, key in places]


def given_weights(config: ScoreConfig) -> dict[str, str]:
    """Return the weights from outside the run by label: paths, or names of hub models."""
    given = {name: getattr(config, name) for name in ("model", "text_encoder", "image_encoder")}
    return {name: text for name, text in given.items() if text is not None}


def stage(
    config: ScoreConfig,
    *,
    rows: str,
    identify: Callable[[ScoreConfig], tuple[str, str]],
    load: Callable[[ScoreConfig], PairScorer],
    parallel: bool,
    features: bool = False,
) -> Stage:
    """Return the stage that scores what the stage `rows` kept; `identify` and `load` give the encoders.

    With `features`, the images' features are read from `image_features` if its encoder is the same.
    """
    return Stage(
        "score",
        title="cosine of image and caption by two encoders",
        version=2,
        config=config,
        parents=("corpus", "download", rows, *(("image_features",) if features else ())),
        plan=functools.partial(plan, identify=identify),
        run=functools.partial(run, load=load),
        parallel=parallel,
        weights=given_weights,
    )


def filter_stage(config: FilterScoreConfig, *, rows: str) -> Stage:
    """Return the stage that drops the rows scored below the threshold."""
    return Stage(
        "filter_score",
        title="drops images that their captions do not describe",
        version=1,
        config=config,
        parents=("corpus", rows, "score"),
        plan=plan_filter,
        run=run_filter,
    )
