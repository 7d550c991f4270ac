"""Stages concepts, match_concepts, count_concepts and balance: a corpus in which no concept prevails.

The first three only count: which entries, which captions have them, how many of each. `balance` drops rows
by the counts, so after another cap only `balance` runs again. docs/guides/balancing.md shows how to use them.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import polars as pl
from annotated_types import Ge, Le

from data_prep.accounting.drop_table import DETAIL
from data_prep.accounting.judged import JudgedFacts, publish_judged
from data_prep.concepts import matching
from data_prep.concepts.entries import LONGEST_NGRAM, count_ngrams, plain, read_entries, sampled
from data_prep.corpus_facts import is_exempt, kept_tables, rows_stage, table_name
from data_prep.dedup.exact import DUPLICATE
from data_prep.formats.parquet import write_table
from data_prep.rules.image import BALANCE_RULE
from data_prep.rules.text import TOO_SHORT
from pipeline.core import store
from pipeline.core.config import NOT_IN_DIGEST
from pipeline.core.facts import Facts
from pipeline.core.records import DropReason, InputError, Manifest, Shard
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

NO_CONCEPT = DropReason("no_concept")
CONCEPT_BALANCE = DropReason("concept_balance")

ENTRIES_FILE, COUNTS_FILE = "concepts.parquet", "counts.parquet"
CONCEPTS_COLUMN, CHANCE_COLUMN = "concepts", "concept_chance"  # of sidecars
SHOWN_ENTRIES = 20  # the most frequent, in the report
_ROWS_PER_TASK = 2_000_000  # so that building the automaton is a small part of a task


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptsConfig:
    """`[concepts]`: count the concepts of the captions that the stages before have kept. Drops nothing."""

    files: tuple[str, ...] = field(default=(), metadata=NOT_IN_DIGEST)
    """Text files with one entry a line (UTF-8, also .gz), such as Wikipedia's dump of titles."""
    min_characters: Annotated[int, Ge(1)] = 2
    """Shortest entry of a file, in characters; shorter ones are left out."""
    ngrams: Annotated[int, Ge(0), Le(LONGEST_NGRAM)] = 0
    """Length of the longest sequences of Chinese characters that become entries because captions often have
    them, from 2 on; 0: none.
    """
    ngram_rows: Annotated[int, Ge(1)] = 1_000_000
    """Captions in which they are counted: the first in the corpus's order, which is random."""
    ngram_min_count: Annotated[int, Ge(1)] = 100
    """Fewest occurrences among these captions."""
    ngram_min_cohesion: float = 5.0
    """Lowest pointwise mutual information of a sequence's two parts, in bits, at its weakest cut: what keeps
    chance neighbours out.
    """

    def __post_init__(self) -> None:
        if not self.files and not self.ngrams:
            raise ValueError("no entries: name files, or the length of ngrams to count, or both")
        if self.ngrams == 1:
            raise ValueError("ngrams = 1: single characters are no concepts; give 2 to 4")


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceConfig:
    """`[balance]`: keep a row if one of its concepts is drawn, as MetaCLIP does."""

    cap: Annotated[int, Ge(1)] = 20_000
    """Rows of an entry up to which it is always drawn; one with more rows is drawn with probability cap /
    rows. MetaCLIP has 20,000 for 400 million pairs.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesTask(Facts):
    """Tables of rows: their paths in the folder of the stage that kept them."""

    tables: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptFacts(Facts):
    """Entries, and those that some caption has; captions, and those with an entry; the most frequent ones."""

    entries: int
    found: int
    captions: int
    matched: int
    top: Mapping[str, int]  # entry → captions


def plan_entries(config: ConceptsConfig, context: Context) -> list[Task]:
    """Plan one task, over the files and the captions in which n-grams are counted.

    Raises:
        InputError: if a file does not exist.
    """
    for path in config.files:
        if not store.exists(path):
            raise InputError(f"{path}: no such file; correct [concepts] files")
    inputs = {f"entries {number}": store.digest_file(path) for number, path in enumerate(config.files)}
    tables = list(_until(kept_tables(context, rows_stage(context)), config.ngram_rows))
    if config.ngrams:
        inputs |= {table.path: table.digest for table in tables}
    return [Task("concepts", inputs, TablesTask(tables=[table.path for table in tables]).to_json())]


def _until(tables: Sequence[Shard], limit: int) -> Iterator[Shard]:
    for table in tables:
        if limit > 0:
            yield table
        limit -= table.num_samples


def run_entries(config: ConceptsConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `concepts.parquet`: entry, as `plain` gives it, and origin (a file's name or `captions`).

    Entries that are too short, and those that are there already, are counted as dropped.

    Raises:
        InputError: if no entry is left.
    """
    parts, num_short = list[pl.DataFrame](), 0
    for path in config.files:
        listed = pl.DataFrame({"entry": read_entries(path)})
        long = listed.filter(pl.col("entry").str.len_chars() >= config.min_characters)
        num_short += listed.height - long.height
        parts.append(long.with_columns(origin=pl.lit(path.rstrip("/").rpartition("/")[2])))
    if config.ngrams:
        asked = TablesTask.from_json(task.arguments).tables
        paths = [context.path_in(rows_stage(context), table) for table in asked]
        captions = list(sampled(paths, config.ngram_rows))
        counted = count_ngrams(
            pl.concat(captions) if captions else pl.Series(dtype=pl.String),
            config.ngrams,
            config.ngram_min_count,
            config.ngram_min_cohesion,
        )
        parts.append(counted.select("entry", origin=pl.lit("captions")))
    listed = pl.concat(parts).with_columns(plain(pl.col("entry")))
    entries = listed.unique("entry", keep="first", maintain_order=True)
    dropped = {str(TOO_SHORT): num_short, str(DUPLICATE): listed.height - entries.height}
    if entries.is_empty():
        raise InputError(
            f"{context.path()}: no entry is long or frequent enough; lower [concepts] min_characters,"
            " ngram_min_count or ngram_min_cohesion"
        )
    write_table(entries, context.path(ENTRIES_FILE))
    return Outcome(
        {ENTRIES_FILE: entries.height},
        num_in=num_short + listed.height,
        num_kept=entries.height,
        dropped={reason: count for reason, count in dropped.items() if count},
    )


def plan_match(config: None, context: Context) -> list[Task]:
    """Plan one task for neighbouring tables of some two million rows: each builds one automaton."""
    entries = context.shards_of("concepts", ENTRIES_FILE)[0].digest
    tasks, group, rows = list[Task](), list[Shard](), 0
    tables = kept_tables(context, rows_stage(context))
    for table, after in itertools.pairwise([*tables, None]):
        assert table is not None
        group.append(table)
        rows += table.num_samples
        if after is None or rows + after.num_samples > _ROWS_PER_TASK:
            inputs = {"entries": entries, **{item.path: item.digest for item in group}}
            asked = TablesTask(tables=[item.path for item in group])
            tasks.append(Task(table_name(group[0]), inputs, asked.to_json()))
            group, rows = [], 0
    return tasks


def run_match(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `matches/<table>.parquet` (key, concepts: numbers of entries) and `counts/<task>.parquet`."""
    tables = TablesTask.from_json(task.arguments).tables
    entries = _entries(context)
    paths = [context.path_in(rows_stage(context), table) for table in tables]
    parts = [matching.texts_of(pl.scan_parquet(path)).collect() for path in paths]
    rows = pl.concat(parts)
    rows = rows.select("key", matching.match(rows["text"], entries).alias(CONCEPTS_COLUMN))
    outputs, first = dict[str, int](), 0
    for table, part in zip(tables, parts, strict=True):
        path = table.replace("kept/", "matches/", 1)
        write_table(rows.slice(first, part.height), context.path(path))
        outputs[path] = part.height
        first += part.height
    count_E = matching.counted(rows[CONCEPTS_COLUMN], len(entries))
    found_F = np.flatnonzero(count_E)
    path = f"counts/{task.name}.parquet"
    counts = pl.DataFrame({"number": found_F.astype(np.uint32), "count": count_E[found_F]})
    write_table(counts, context.path(path))
    matched = int((rows[CONCEPTS_COLUMN].list.len() > 0).sum())
    facts = {"matched": matched}
    return Outcome({**outputs, path: counts.height}, num_in=rows.height, num_kept=rows.height, extra=facts)


def _entries(context: Context) -> pl.Series:
    return pl.read_parquet(context.path_in("concepts", ENTRIES_FILE), columns=["entry"])["entry"]


def plan_count(config: None, context: Context) -> list[Task]:
    """Plan one task, which adds the counts up."""
    inputs = {shard.path: shard.digest for shard in _counts(context)}
    return [Task("counts", {**inputs, "entries": context.shards_of("concepts", ENTRIES_FILE)[0].digest})]


def _counts(context: Context) -> list[Shard]:
    return [shard for shard in context.parents["match_concepts"].shards if shard.path.startswith("counts/")]


def run_count(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `counts.parquet`: entry, count (captions that have it) and seed, its part of a draw."""
    entries = _entries(context)
    count_E = np.zeros(len(entries), np.int64)
    parts = _counts(context)
    for number, shard in enumerate(parts, start=1):
        part = pl.read_parquet(context.path_in("match_concepts", shard.path))
        count_E[part["number"].to_numpy()] += part["count"].to_numpy()
        progress(number, len(parts), "counts added")
    table = pl.DataFrame(
        {"entry": entries, "count": count_E, "seed": matching.entry_seeds(entries)},
    )
    write_table(table, context.path(COUNTS_FILE))
    matches = context.parents["match_concepts"]
    facts = ConceptFacts(
        entries=len(entries),
        found=int((count_E > 0).sum()),
        captions=matches.num_kept,
        matched=sum(extra["matched"] for extra in matches.extra.values()),
        top=dict(_top(table).select(_shown(), "count").iter_rows()),
    )
    return Outcome(
        {COUNTS_FILE: table.height}, num_in=table.height, num_kept=table.height, extra=facts.to_json()
    )


def note(manifest: Manifest) -> str:
    """Return a sentence on the concepts of a corpus, from the manifest of `count_concepts`."""
    facts = facts_of(manifest)
    top = ", ".join(f"{entry} {count:,}" for entry, count in itertools.islice(facts.top.items(), 5))
    return (
        f"{manifest.stage}: {facts.found:,} of {facts.entries:,} entries are in {facts.matched:,} of"
        f" {facts.captions:,} captions; the most frequent: {top or 'none'}"
    )


def facts_of(manifest: Manifest) -> ConceptFacts:
    """Return what a finished stage `count_concepts` has counted."""
    return ConceptFacts.from_json(manifest.extra["counts"])


def kept_of(manifest: Manifest) -> Counter[str]:
    """Return the kept rows of the most frequent entries, from the manifest of `balance`."""
    total = Counter[str]()
    for extra in manifest.extra.values():
        total.update(JudgedFacts.from_json(extra).concepts or {})
    return total


def _top(counts: pl.DataFrame) -> pl.DataFrame:
    """Return the most frequent entries with their numbers, the most frequent first."""
    numbered = counts.with_row_index("number").filter(pl.col("count") > 0)
    return numbered.sort("count", "entry", descending=[True, False]).head(SHOWN_ENTRIES)


def _shown() -> pl.Expr:
    return pl.col("entry").str.strip_chars()


def plan(config: BalanceConfig, context: Context) -> list[Task]:
    """Plan one task for each table of rows, bound to its matches and to the counts of the whole corpus."""
    counts = context.shards_of("count_concepts", COUNTS_FILE)[0].digest
    matches = {shard.path: shard.digest for shard in context.parents["match_concepts"].shards}
    return [
        Task(
            table_name(table),
            {
                "rows": table.digest,
                "counts": counts,
                "matches": matches[table.path.replace("kept/", "matches/", 1)],
            },
            TablesTask(tables=[table.path]).to_json(),
        )
        for table in kept_tables(context, rows_stage(context))
    ]


def run(config: BalanceConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Keep the rows of one table that one of their concepts is drawn for.

    They carry `concepts`, the texts of their entries, and `concept_chance`, the chance that they were kept.
    """
    (table,) = TablesTask.from_json(task.arguments).tables
    rows = pl.read_parquet(context.path_in(rows_stage(context), table))
    matches = pl.read_parquet(context.path_in("match_concepts", table.replace("kept/", "matches/", 1)))
    if not rows["key"].equals(matches["key"]):
        raise InputError(
            f"{context.path_in('match_concepts')}: concepts of other rows; run `--stage match_concepts"
            " --redo`"
        )
    counts = pl.read_parquet(context.path_in("count_concepts", COUNTS_FILE))
    balanced = matching.balance(context.seed, matches, counts, config.cap)
    exempt = is_exempt(context.parents["corpus"], BALANCE_RULE, rows.columns)
    names, of_entry = counts["entry"].str.strip_chars(), pl.col("rarest")
    reason = pl.when(of_entry.is_null()).then(pl.lit(str(NO_CONCEPT))).otherwise(pl.lit(str(CONCEPT_BALANCE)))
    judged = (
        rows.drop(CONCEPTS_COLUMN, CHANCE_COLUMN, strict=False)
        .with_columns(
            *balanced.get_columns(), pl.Series(_texts(matches[CONCEPTS_COLUMN], names)).alias(CONCEPTS_COLUMN)
        )
        .with_columns(reason=pl.when(~pl.col("is_kept") & ~exempt).then(reason))
        .drop("is_kept")
    )
    is_kept = judged["reason"].is_null()
    rarest = judged["rarest"].filter(~is_kept)
    detail = pl.DataFrame(
        {"entry": names.gather(rarest), "count": counts["count"].gather(rarest), "at": rarest}
    ).select(
        pl.when(pl.col("at").is_not_null()).then(
            pl.format("the rarest concept, {}, has {} rows; cap {}", "entry", "count", pl.lit(config.cap))
        )
    )
    dropped = judged.filter(~is_kept).with_columns(detail.to_series().alias(DETAIL))
    top = _top(counts)
    kept_E = matching.counted(matches[CONCEPTS_COLUMN].filter(is_kept), counts.height)
    facts = JudgedFacts(
        rules={BALANCE_RULE: 1},
        concepts=dict(
            zip(top.select(_shown()).to_series(), kept_E[top["number"].to_numpy()].tolist(), strict=True)
        ),
    )
    return publish_judged(
        context, task, judged.filter(is_kept).drop("reason", "rarest"), dropped.drop("rarest"), facts
    )


def _texts(numbers: pl.Series, names: pl.Series) -> pl.Series:
    """Return the texts of lists of numbers, List(String)."""
    row_M = np.repeat(np.arange(len(numbers)), numbers.list.len().to_numpy())
    texts = names.gather(numbers.explode(empty_as_null=False)).to_arrow(compat_level=pl.CompatLevel.oldest())
    return matching.lists(row_M, texts, len(numbers))


def count_stages(config: ConceptsConfig, *, rows: str) -> list[Stage]:
    """Return the stages that count the concepts of the rows that the stage `rows` kept."""
    return [
        Stage(
            "concepts",
            title="entries by which concepts are found",
            version=1,
            config=config,
            parents=("corpus", rows),
            plan=plan_entries,
            run=run_entries,
        ),
        Stage(
            "match_concepts",
            title="finds the concepts of each caption",
            version=1,
            config=None,
            parents=("corpus", rows, "concepts"),
            plan=plan_match,
            run=run_match,
        ),
        Stage(
            "count_concepts",
            title="counts the captions of each concept",
            version=1,
            config=None,
            parents=("concepts", "match_concepts"),
            plan=plan_count,
            run=run_count,
        ),
    ]


def stage(config: BalanceConfig, *, rows: str) -> Stage:
    """Return the stage that balances the rows that the stage `rows` kept."""
    return Stage(
        "balance",
        title="drops rows of concepts that prevail",
        version=1,
        config=config,
        parents=("corpus", rows, "match_concepts", "count_concepts"),
        plan=plan,
        run=run,
        is_seeded=True,
    )
