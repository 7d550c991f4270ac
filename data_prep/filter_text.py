"""Stage filter_text: a caption table in; out, rows that pass every text rule, and why the others did not."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from data_prep import text_rules
from data_prep.corpus import evaluation_urls, tables_of
from data_prep.drop_table import publish_judged, with_key
from data_prep.sources.table import JUDGED_ONLY, from_description, naming_damage, scan
from data_prep.text_rules import TextRule
from pipeline import store
from pipeline.records import ConfigError
from pipeline.stage import Context, Outcome, Progress, Task

# LAION-5B's tables hold some 17 million rows each; a task holds this many of them in memory.
ROWS_PER_TASK = 500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterTextConfig:
    """`[filter_text]`: which rows of the caption tables stay (paper, section 2.2)."""

    language: str = "zh"  # LAION-5B's language mark to keep, where the source has the column
    min_score: float = 0.26  # mCLIP cosine, where the source has scores
    min_characters: int = 5
    max_characters: int = 50
    blacklists: tuple[str, ...] = ("advertising", "file_name")  # files of data_prep/blacklists, in this order
    # The paper has none of the following.
    min_chinese_share: float = 0.0  # of the characters that are no white space; 0 is off
    drop_nsfw: tuple[str, ...] = ()  # LAION-5B's marks to drop: NSFW, LIKELY, UNSURE; none is off
    max_unsafe: float | None = None  # LAION-5B's punsafe, a probability; unset is off
    max_watermark: float | None = None  # LAION-5B's pwatermark, a probability; unset is off
    # Captions that differ in width, case, white space or punctuation, and addresses that differ in scheme or
    # fragment, are duplicates of each other.
    normalise_duplicates: bool = False

    def __post_init__(self) -> None:
        if self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters {self.min_characters} is above max_characters {self.max_characters}"
            )


def tasks(config: FilterTextConfig, context: Context) -> list[Task]:
    """One task a table, or a slice of one that is longer than a task should hold in memory."""
    corpus = context.parents["corpus"]
    shared = {f"blacklist {theme}": _words_digest(theme) for theme in config.blacklists}
    shared |= {os.path.basename(urls.path): urls.digest for urls in evaluation_urls(context)}
    return [
        Task(
            name=f"{number:05d}{piece}",
            inputs={**shared, "table": table["digest"]},
            arguments={"table": {key: table[key] for key in ("stage", "path", "source")}, **rows},
        )
        for number, table in enumerate(tables_of(corpus))
        for piece, rows in _slices(table["num_rows"])
    ]


def _slices(num_rows: int) -> Iterator[tuple[str, dict[str, int]]]:
    """(suffix of the task's name, its rows); a table that one task holds has neither."""
    if num_rows <= ROWS_PER_TASK:
        yield "", {}
        return
    for number, first in enumerate(range(0, num_rows, ROWS_PER_TASK)):
        yield f"-{number:05d}", {"first": first, "count": min(ROWS_PER_TASK, num_rows - first)}


def run(config: FilterTextConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Judge one table. Kept rows are sorted by key, the order of the shuffled corpus."""
    table = task.arguments["table"]
    source = from_description(table["source"])
    path = context.path_in(table["stage"], table["path"]) if table["stage"] else table["path"]
    frame = scan(path, source)
    names = frame.collect_schema().names()
    with naming_damage(path):
        has_scores = _has_scores(frame)  # of the whole table: all its slices are judged by the same rules
    if "first" in task.arguments:
        frame = frame.slice(task.arguments["first"], task.arguments["count"])
    rules = rules_for(config, source.exemptions, context, has_scores)
    judged = with_key(
        frame.with_columns(reason=text_rules.first_reason(rules)), normalise=config.normalise_duplicates
    )
    with naming_damage(path):
        rows = judged.collect(engine="streaming")
    kept = (
        rows.filter(pl.col("reason").is_null())
        .with_columns(pl.col("caption").str.strip_chars(), file=pl.lit(int(task.name[:5]), dtype=pl.Int32))
        .select("key", "file", *names)
        .drop(*JUDGED_ONLY)
        .sort("key", "row")
    )
    scores = rows["score"].drop_nulls().drop_nans()
    return publish_judged(
        context,
        task,
        kept,
        rows.filter(pl.col("reason").is_not_null()),
        extra={
            "source": source.name,
            # Where every row already passes, the threshold is a no-op: the minimum shows it.
            "score_minimum": round(float(scores.min()), 4) if len(scores) else None,  # type: ignore[arg-type]
            "rules": {rule.name: rule.version for rule in rules},
        },
    )


def rules_for(
    config: FilterTextConfig, exempt_from: tuple[str, ...], context: Context, has_scores: bool
) -> list[TextRule]:
    """The rules of one source in the order they are asked; the first that drops a row names the reason."""
    unknown = sorted(set(exempt_from) - set(text_rules.SWITCHABLE_RULES))
    if unknown:
        known = ", ".join(text_rules.SWITCHABLE_RULES)
        raise ConfigError(f"corpus: exempt_from: no rule {unknown[0]!r}; known: {known}")
    rules = [text_rules.caption_present(), text_rules.url_valid()]
    urls = [url for file in evaluation_urls(context) for url in store.read_text(file.path).splitlines()]
    if urls:
        rules.append(text_rules.not_an_evaluation_url(urls))
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
    rules.append(
        text_rules.not_blacklisted({theme: text_rules.blacklist(theme) for theme in config.blacklists})
    )
    return [rule for rule in rules if rule.name not in exempt_from]


def _has_scores(frame: pl.LazyFrame) -> bool:
    """A source without any score (Wukong) is not judged by one; a source with some is (paper: LAION only)."""
    return bool(frame.select(pl.col("score").is_not_null().any()).collect().item())


def _words_digest(theme: str) -> Any:
    from pipeline.config import digest

    return digest(text_rules.blacklist(theme))
