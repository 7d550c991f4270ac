"""Stage filter_text: keeps rows of caption tables that pass every text rule; drops the rest with reasons."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import polars as pl
from annotated_types import Ge, Le

from data_prep.accounting.histograms import histogram
from data_prep.accounting.judged import JudgedFacts, SourceCounts, publish_judged
from data_prep.corpus_facts import TablePlace, evaluation_urls, score_pairs, tables_of
from data_prep.formats.keys import with_key
from data_prep.formats.parquet import holds_values
from data_prep.rules import chinese_script
from data_prep.rules import text as text_rules
from data_prep.rules.image import SWITCHABLE_IMAGE_RULES
from data_prep.rules.text import TextRule
from data_prep.sources.list_columns import ALL_CAPTIONS
from data_prep.sources.table import (
    EXEMPT_COLUMN,
    JUDGED_ONLY,
    TableSource,
    naming_damage,
    open_parquet,
    resolve,
    scan,
)
from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.facts import Facts
from pipeline.core.failures import PARTITION_FAILED
from pipeline.core.records import ConfigError, Manifest
from pipeline.core.shard_format import all_captions
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

# LAION-5B's tables have some 17 million rows each; a task holds this many of them in memory.
ROWS_PER_TASK = 500_000
# Each task of dedup reads a range of a table and wastes what it reads of the groups at both ends.
_ROWS_PER_GROUP = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterTextConfig:
    """`[filter_text]`: which rows of the caption tables stay (paper, section 2.2)."""

    language: str = "zh"
    """LAION-5B language tag to keep, if the source has the column."""
    min_score: Annotated[float, Ge(-1), Le(1)] = 0.26
    """Lowest mCLIP cosine to keep, if the source has scores."""
    min_characters: Annotated[int, Ge(0)] = 5
    """Smallest number of characters in a caption."""
    max_characters: Annotated[int, Ge(1)] = 50
    """Largest number of characters in a caption."""
    blacklists: tuple[str, ...] = ("advertising", "file_name")
    """Word lists in `data_prep/blacklists/`, applied in this order."""
    # The paper has none of the following.
    min_chinese_share: Annotated[float, Ge(0), Le(1)] = 0.0
    """Smallest share of Chinese characters, not counting white space; 0 is off (not in the paper)."""
    drop_nsfw: tuple[str, ...] = ()
    """LAION-5B marks to drop: `NSFW`, `LIKELY`, `UNSURE`; empty is off (not in the paper)."""
    max_unsafe: Annotated[float, Ge(0), Le(1)] | None = None
    """Largest LAION-5B `punsafe`, a probability; unset is off (not in the paper)."""
    max_watermark: Annotated[float, Ge(0), Le(1)] | None = None
    """Largest LAION-5B `pwatermark`, a probability; unset is off (not in the paper)."""
    normalise_duplicates: bool = False
    """Whether captions that differ only in width, case, white space or punctuation, and addresses that differ
    only in scheme or fragment, count as duplicates (not in the paper).
    """
    traditional: Literal["keep", "drop", "convert"] = "keep"
    """Captions with traditional characters: keep them, drop them, or convert them to simplified ones (not in
    the paper).
    """

    def __post_init__(self) -> None:
        if self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters {self.min_characters} is above max_characters {self.max_characters}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTask(Facts):
    """A table, or the slice of it that a task judges."""

    table: TablePlace
    first: int | None = None
    count: int | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        table = TablePlace.from_json(fields["table"])
        return cls(table=table, first=fields.get("first"), count=fields.get("count"))


def plan(config: FilterTextConfig, context: Context) -> list[Task]:
    """Plan one task for each table, or for each slice of a table that is too long for memory.

    Raises:
        ConfigError: if one threshold would apply to scores of different encoders.
    """
    corpus = context.parents["corpus"]
    _refuse_mixed_scores(corpus)
    shared = {f"blacklist {theme}": _words_digest(theme) for theme in config.blacklists}
    shared |= {os.path.basename(urls.path): urls.digest for urls in evaluation_urls(context)}
    return [
        Task(
            name=f"{number:05d}{piece}",
            inputs={**shared, "table": table.digest},
            arguments=TextTask(table=table.place, **rows).to_json(),
        )
        for number, table in enumerate(tables_of(corpus))
        for piece, rows in _slices(table.num_rows)
    ]


def _slices(num_rows: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Return (suffix of the task's name, its rows); both are empty if one task holds the whole table."""
    if num_rows <= ROWS_PER_TASK:
        yield "", {}
        return
    for number, first in enumerate(range(0, num_rows, ROWS_PER_TASK)):
        yield f"-{number:05d}", {"first": first, "count": min(ROWS_PER_TASK, num_rows - first)}


def task_names(table: int, row: int) -> tuple[str, str]:
    """Return the names that the task of a row may have: of the whole table, or of the slice with the row."""
    return f"{table:05d}", f"{table:05d}-{row // ROWS_PER_TASK:05d}"


def rows_of_task(name: str) -> tuple[int, int | None, int | None]:
    """Return the table, first row and number of rows that the task of a name judges; None, None: all rows."""
    table, _, piece = name.partition("-")
    return (int(table), int(piece) * ROWS_PER_TASK, ROWS_PER_TASK) if piece else (int(table), None, None)


def run(config: FilterTextConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Judge one table. Kept rows are sorted by key, the order of the shuffled corpus."""
    asked = TextTask.from_json(task.arguments)
    source, path = asked.table.source, asked.table.full_path(context.run_folder)
    frame = scan(path, source, is_whole=True, first=asked.first or 0, count=asked.count)
    names = frame.collect_schema().names()
    captions_dropped = None
    with naming_damage(path):
        # Of the whole table: the same rules judge all its slices.
        has_scores = _has_scores(path, source)
        groups = by_exemptions(frame, source)
    urls = [url for file in evaluation_urls(context) for url in store.read_text(file.path).splitlines()]
    judged, rules = list[pl.LazyFrame](), dict[str, TextRule]()
    for exempt, part in groups:
        of_group = rules_for(config, exempt, urls, has_scores)
        judged.append(
            prepared(part, config, exempt, each=True).with_columns(reason=text_rules.first_reason(of_group))
        )
        rules |= {rule.name: rule for rule in of_group}
    with naming_damage(path):
        rows = pl.concat(judged).collect(engine="streaming")
    if ALL_CAPTIONS in names:
        rows, captions_dropped = _with_all_captions(rows)
        names[names.index(ALL_CAPTIONS)] = all_captions("caption")
    elif len(groups) > 1:
        rows = rows.sort("row")
    kept = (
        rows.filter(pl.col("reason").is_null())
        .with_columns(pl.col("caption").str.strip_chars(), file=pl.lit(int(task.name[:5]), dtype=pl.Int32))
        .select("key", "file", *names)
        .drop(*JUDGED_ONLY)
        .sort("key", "row")
    )
    dropped = rows.filter(pl.col("reason").is_not_null())
    # Record the word, because users edit lists after a run: `cnclip why` names the word that matched then.
    dropped = dropped.with_columns(text_rules.blacklist_words(dropped, _themes(config)))
    scores = rows["score"].drop_nulls().drop_nans()
    judges_scores = text_rules.SCORE_RULE in rules and len(scores) > 0
    return publish_judged(
        context,
        task,
        kept,
        dropped,
        JudgedFacts(
            source=source.name,
            rules={name: rule.version for name, rule in rules.items()},
            # If every row already passes, the threshold is a no-op, and the minimum shows it.
            min_score=config.min_score,
            score_minimums={source.name: round(float(scores.min()), 4)} if judges_scores else {},  # type: ignore[arg-type]
            histograms={
                "characters": histogram("characters", _length(kept), _length(dropped)),
                **({"score": histogram("score", kept["score"], dropped["score"])} if len(scores) else {}),
            },
            captions_dropped=captions_dropped,
        ),
        rows_per_group=_ROWS_PER_GROUP,
    )


def set_aside(config: FilterTextConfig, context: Context, task: Task) -> Outcome:
    """Drop the rows of a table, or of a slice of it, as `partition_failed`.

    They have no keys, since the table may be what could not be read.
    """
    asked = TextTask.from_json(task.arguments)
    table = tables_of(context.parents["corpus"])[int(task.name[:5])]
    count = table.num_rows if asked.count is None else asked.count
    dropped = {str(PARTITION_FAILED): count}
    source = asked.table.source.name
    facts = JudgedFacts(
        source=source,
        sources={source: SourceCounts(num_in=count, dropped=dropped)},
        min_score=config.min_score,
        rules={},
    )
    return Outcome({}, num_in=count, num_kept=0, dropped=dropped, extra=facts.to_json())


def by_exemptions(frame: pl.LazyFrame, source: TableSource) -> list[tuple[tuple[str, ...], pl.LazyFrame]]:
    """Split a canonical table by the rules that do not apply; rows from shards bring their own exemptions."""
    if EXEMPT_COLUMN not in source.carry_columns:
        return [(source.exemptions, frame)]
    own = pl.col(EXEMPT_COLUMN)
    found = frame.select(own.unique().sort(nulls_last=False)).collect().to_series().to_list() or [None]
    return [
        (tuple(dict.fromkeys((*source.exemptions, *filter(None, (value or "").split(","))))), part)
        for value in found
        for part in [frame.filter(own.eq_missing(pl.lit(value, pl.String)))]
    ]


def prepared(
    frame: pl.LazyFrame, config: FilterTextConfig, exempt: Sequence[str], *, each: bool = False
) -> pl.LazyFrame:
    """Return a canonical table with its keys, and captions as they are judged and kept (see text_rules).

    Keys come from the original caption, so that users can ask for a caption as its source has it. With
    `each`, a row that keeps several captions is there once for each of them, with the key of the first.
    """
    normalise = config.normalise_duplicates and text_rules.NORMALISED_DUPLICATES_RULE not in exempt
    keyed = with_key(frame, normalise=normalise)
    if ALL_CAPTIONS in frame.collect_schema():
        if each:
            keyed = keyed.explode(ALL_CAPTIONS, empty_as_null=True).with_columns(caption=ALL_CAPTIONS)
        keyed = keyed.drop(ALL_CAPTIONS)
    return keyed.with_columns(caption=judged_caption(pl.col("caption"), config, exempt))


def _with_all_captions(rows: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """Join judged captions to their rows again; also return reason → captions that rows which stay lost.

    A row stays with the captions that no rule drops, or goes by the reason of its first.
    """
    captions = pl.col("caption").str.strip_chars().unique(maintain_order=True)
    stays = rows.filter(pl.col("reason").is_null())
    stays = stays.group_by("row", maintain_order=True).agg(
        captions.alias(all_captions("caption")), pl.all().exclude("row").first()
    )
    goes = rows.join(stays, on="row", how="anti").unique("row", keep="first", maintain_order=True)
    lost = rows.filter(pl.col("reason").is_not_null()).join(stays, on="row", how="semi")
    counts = dict(lost.group_by("reason").len().sort("reason").iter_rows())
    return pl.concat([stays, goes], how="diagonal").sort("row"), counts


def judged_caption(caption: pl.Expr, config: FilterTextConfig, exempt: Sequence[str] = ()) -> pl.Expr:
    """Return a caption as the rules see it and as it is kept, apart from outer white space."""
    visible = text_rules.visible(caption)
    if config.traditional == "convert" and text_rules.TRADITIONAL_RULE not in exempt:
        return chinese_script.simplified(visible)
    return visible


def _length(rows: pl.DataFrame) -> pl.Series:
    return rows["caption"].str.strip_chars().str.len_chars()


def _themes(config: FilterTextConfig) -> dict[str, tuple[str, ...]]:
    return {theme: text_rules.blacklist(theme) for theme in config.blacklists}


def _refuse_mixed_scores(corpus: Manifest) -> None:
    """Check that one threshold applies to the cosines of one encoder pair only; pairs differ by tenths."""
    found: dict[str, str] = {}
    for source, pairs in score_pairs(corpus).items():
        found |= dict.fromkeys(pairs, source)
    if len(found) > 1:
        listed = ", ".join(f"{pair} (source {source})" for pair, source in sorted(found.items()))
        raise ConfigError(
            f"filter_text.min_score: scores of different encoder pairs have no threshold in common: {listed};"
            f' name it with score_pair if it is the same, or give exempt_from = ["score"] and use [score]'
        )


def rules_for(
    config: FilterTextConfig, exempt_from: tuple[str, ...], evaluation_urls: Sequence[str], has_scores: bool
) -> list[TextRule]:
    """Return the rules of one source in order; the first that drops a row gives the reason.

    `evaluation_urls` are addresses of evaluation images, which stay out of training.
    """
    lists = {f"{text_rules.BLACKLIST_RULE}:{theme}" for theme in config.blacklists}
    known_rules = (*text_rules.SWITCHABLE_RULES, *SWITCHABLE_IMAGE_RULES, *sorted(lists))
    # A word list that only another run uses is not a mistake.
    unknown = sorted({*exempt_from} - {*known_rules} - {f"blacklist:{name}" for name in text_rules.themes()})
    if unknown:
        known = ", ".join(known_rules)
        raise ConfigError(f"corpus: exempt_from: no rule {unknown[0]!r}; known: {known}")
    rules = [text_rules.caption_present(), text_rules.url_valid()]
    if evaluation_urls:
        rules.append(text_rules.not_an_evaluation_url(evaluation_urls))
    rules.append(text_rules.language_is(config.language))
    if has_scores:
        rules.append(text_rules.score_at_least(config.min_score))
    rules.append(text_rules.characters_between(config.min_characters, config.max_characters))
    if config.min_chinese_share > 0:
        rules.append(text_rules.chinese_share_at_least(config.min_chinese_share))
    if config.drop_nsfw or config.max_unsafe is not None:
        rules.append(text_rules.not_nsfw(config.drop_nsfw, config.max_unsafe))
    if config.max_watermark is not None:
        rules.append(text_rules.no_watermark(config.max_watermark))
    if config.traditional == "drop":
        rules.append(text_rules.no_traditional_characters())
    applied = {
        name: words for name, words in _themes(config).items() if f"blacklist:{name}" not in exempt_from
    }
    rules.append(text_rules.not_blacklisted(applied))
    return [rule for rule in rules if rule.name not in exempt_from]


def _has_scores(path: str, source: TableSource) -> bool:
    """Return whether a table has scores; one without (Wukong) is not judged by them (paper: LAION only)."""
    column = resolve(path, source, open_parquet(path).collect_schema().names())["score_column"]
    told = False if column is None else holds_values(path, column)
    if told is not None:
        return told  # no slice of a long table reads the scores of all others
    scores = scan(path, source, is_whole=True).select(pl.col("score").is_not_null().any())
    return bool(scores.collect().item())


def _words_digest(theme: str) -> Any:

    return digest(text_rules.blacklist(theme))


def stage(config: FilterTextConfig) -> Stage:
    """Return the stage that judges captions and addresses."""
    return Stage(
        "filter_text",
        title="language, score, length, blacklist, addresses of evaluation images",
        version=4,
        config=config,
        parents=("corpus",),
        plan=plan,
        run=run,
        set_aside=set_aside,
    )
