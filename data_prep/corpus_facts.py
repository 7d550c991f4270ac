"""The facts that the corpus stage records for later stages: tables, folders, scores, exemptions."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import polars as pl

from data_prep.accounting.judged import SourceCounts, sources_from_json
from data_prep.rules.text import SCORE_RULE
from data_prep.sources.table import EXEMPT_COLUMN, TableSource, from_description
from pipeline.core import store
from pipeline.core.evaluation_sets import EvaluationFacts
from pipeline.core.facts import Facts
from pipeline.core.records import InputError, Manifest, Shard
from pipeline.core.stage import Context, repair_remedy

# Stages that judge downloaded images, in order; all but the first are optional.
ROW_STAGES = ("filter_image", "dedup_image", "dedup_semantic", "filter_score", "filter_classes", "balance")
_UNPACKED = "images"  # folder of the corpus stage, for images that can't be read where they are


@dataclass(frozen=True, slots=True, kw_only=True)
class OutsideTable(Facts):
    """A Parquet table that stays in place."""

    path: str
    source: TableSource
    digest: str

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(path=fields["path"], source=from_description(fields["source"]), digest=fields["digest"])


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFacts(Facts):
    """The facts of one task of the corpus stage."""

    tables: Mapping[str, TableSource] = field(default_factory=dict)  # path in the stage's folder → columns
    external: OutsideTable | None = None
    sources: Mapping[str, SourceCounts] = field(default_factory=dict)
    score_pairs: Mapping[str, Sequence[str]] = field(default_factory=dict)  # source → pairs of encoders
    packed: Mapping[str, str] = field(default_factory=dict)  # source → folder of TSV, tar, … or LMDB files
    unpacked: Sequence[str] = ()  # sources of whose images the stage's folder has copies
    guards: Sequence[str] = ()  # paths
    site: bool = False  # the stage's folder has a web site that the download stage serves
    evaluations: EvaluationFacts = field(default_factory=lambda: EvaluationFacts({}, {}))

    def to_json(self) -> dict[str, Any]:
        # Named, since super() fails in a class with slots.
        own = {name: value for name, value in Facts.to_json(self).items() if value}
        return own | self.evaluations.to_json()

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        external = fields.get("external")
        return cls(
            tables={path: from_description(source) for path, source in fields.get("tables", {}).items()},
            external=OutsideTable.from_json(external) if external else None,
            sources=sources_from_json(fields),
            score_pairs=fields.get("score_pairs", {}),
            packed=fields.get("packed", {}),
            unpacked=fields.get("unpacked", ()),
            guards=fields.get("guards", ()),
            site=fields.get("site", False),
            evaluations=EvaluationFacts.from_json(fields),
        )


def facts_of(corpus: Manifest) -> dict[str, CorpusFacts]:
    """Return task → facts of the finished corpus stage."""
    return {task: CorpusFacts.from_json(extra) for task, extra in corpus.extra.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlace(Facts):
    """The place of a caption table, and how to read it."""

    stage: str | None  # the stage that wrote it; None: a file outside the run
    path: str  # in the stage's folder
    source: TableSource

    def to_json(self) -> dict[str, Any]:
        return {"stage": None, **Facts.to_json(self)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(stage=fields["stage"], path=fields["path"], source=from_description(fields["source"]))

    def full_path(self, run_folder: str) -> str:
        """Return the table's path."""
        return store.join(run_folder, self.stage, self.path) if self.stage else self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsTask(Facts):
    """A table of rows: its path in the folder of the stage that kept them."""

    table: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighboursTask(Facts):
    """Neighbouring tables of rows: their paths in the folder of the stage that kept them."""

    tables: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusTable:
    """A caption table of the corpus."""

    place: TablePlace
    digest: str
    num_rows: int


def tables_of(corpus: Manifest) -> list[CorpusTable]:
    """Return the tables of the corpus in order."""
    shards = {shard.path: shard for shard in corpus.shards}
    tables = []
    for facts in facts_of(corpus).values():
        for path, source in facts.tables.items():
            place = TablePlace(stage="corpus", path=path, source=source)
            tables.append(
                CorpusTable(place=place, digest=shards[path].digest, num_rows=shards[path].num_samples)
            )
        if outside := facts.external:
            place = TablePlace(stage=None, path=outside.path, source=outside.source)
            num_rows = facts.sources[outside.source.name].num_in
            tables.append(CorpusTable(place=place, digest=outside.digest, num_rows=num_rows))
    return tables


def keeps_captions(corpus: Manifest) -> bool:
    """Return whether a row of the corpus may have several captions."""
    return any(table.place.source.list_captions == "random" for table in tables_of(corpus))


def unpacked_images(task: str) -> str:
    """Return a task's tar of images that its source keeps compressed, in the stage's folder."""
    return f"{_UNPACKED}/{task}.tar"


def malformed_table(task: str) -> str:
    """Return a task's table of malformed rows (reason, text: its beginning), in the stage's folder."""
    return f"malformed/{task}.parquet"


def rows_stage(context: Context) -> str:
    """Return the parent whose kept rows a stage continues with, the last one in ROW_STAGES."""
    return next(name for name in reversed(ROW_STAGES) if name in context.parents)


def kept_tables(context: Context, stage: str) -> list[Shard]:
    """Return the tables of a stage's kept rows in order, by their paths in its folder."""
    return [shard for shard in context.parents[stage].shards if shard.path.startswith("kept/")]


def neighbours(tables: Sequence[Shard], num_rows: int) -> list[list[Shard]]:
    """Cut tables into groups of neighbours with at most `num_rows` rows, or one table, in each."""
    groups, rows = list[list[Shard]](), 0
    for table in tables:
        if not groups or rows + table.num_samples > num_rows:
            groups.append([])
            rows = 0
        groups[-1].append(table)
        rows += table.num_samples
    return groups


def table_name(shard: Shard) -> str:
    """Return `00000` of `kept/00000.parquet`."""
    return Path(shard.path).stem


def exemptions(corpus: Manifest) -> dict[str, tuple[str, ...]]:
    """Return source → names of the rules that do not apply."""
    return {table.place.source.name: table.place.source.exemptions for table in tables_of(corpus)}


def exempt_sources(corpus: Manifest, rule: str) -> list[str]:
    """Return the names of the sources that a rule does not apply to."""
    return [source for source, rules in exemptions(corpus).items() if rule in rules]


def is_exempt(corpus: Manifest, rule: str, columns: Sequence[str]) -> pl.Expr:
    """Return which rows a rule does not apply to, by their source or by their own exemptions.

    `columns` are those of the table of rows.
    """
    by_source = pl.col("source").is_in(exempt_sources(corpus, rule))
    if EXEMPT_COLUMN not in columns:
        return by_source
    return by_source | pl.col(EXEMPT_COLUMN).str.split(",").list.contains(rule).fill_null(False)


def exemptions_of_shards(folder: str) -> dict[str, tuple[str, ...]]:
    """Return source → rules that do not apply to its rows, from the run of the shards in a folder.

    Empty for shards outside their run.

    Raises:
        InputError: if the manifest of the run's corpus cannot be read.
    """
    run_folder = os.path.dirname(store.absolute(folder).rstrip("/"))
    path = store.join(run_folder, "corpus", "manifest.json")
    if not store.exists(path):
        return {}
    try:
        tables = tables_of(Manifest.from_json(store.read_text(path)))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f"{path}: not the manifest of a corpus, which says the rules that its sources are exempt from;"
            f" {repair_remedy('corpus')}, or move the shards out of that run"
        ) from None
    sources = [table.place.source for table in tables]
    return {source.name: rules for source in sources if (rules := source.lasting_exemptions)}


def with_exemptions(rows: pl.LazyFrame, of_source: Mapping[str, Sequence[str]]) -> pl.LazyFrame:
    """Add EXEMPT_COLUMN to rows of a sidecar: the rules that do not apply to each.

    Rules that a row already names stay. Rows are unchanged if no source has an exemption.
    """
    names = rows.collect_schema().names()
    if not of_source or "source" not in names:
        return rows
    by_source = {source: ",".join(rules) for source, rules in of_source.items()}
    found = [pl.col("source").replace_strict(by_source, default=None, return_dtype=pl.String)]
    if EXEMPT_COLUMN in names:
        found.insert(0, pl.col(EXEMPT_COLUMN))
    rules = pl.concat_str(found, separator=",", ignore_nulls=True).str.split(",")
    # Sorted and unique, because rows with the same rules are judged together.
    both = rules.list.eval(pl.element().filter(pl.element() != "")).list.unique().list.sort().list.join(",")
    return rows.with_columns(pl.when(both != "").then(both).alias(EXEMPT_COLUMN))


def score_pairs(corpus: Manifest) -> dict[str, list[str]]:
    """Return source → encoder pairs of its scores, for sources that are judged by score."""
    exempt = exempt_sources(corpus, SCORE_RULE)
    found: dict[str, list[str]] = {}
    for facts in facts_of(corpus).values():
        for source, pairs in facts.score_pairs.items():
            if source not in exempt:
                found[source] = sorted({*found.get(source, []), *pairs})
    return found


def evaluation_urls(context: Context) -> list[Shard]:
    """Return the files of URLs of evaluation images, one URL a line, for each set that has URLs."""
    return context.shards_of("corpus", "_urls.txt")


def site_folder(context: Context) -> str | None:
    """Return the folder that the download stage serves over loopback, if the corpus has its own site."""
    made = any(facts.site for facts in facts_of(context.parents["corpus"]).values())
    return context.path_in("corpus") if made else None


def image_folders(context: Context) -> dict[str, str]:
    """Return source → folder of images on disk, which the download stage also serves over loopback."""
    sources = [table.place.source for table in tables_of(context.parents["corpus"])]
    return {source.name: source.picture_folder for source in sources if source.picture_folder}


def packed_folders(context: Context) -> dict[str, str]:
    """Return source → folder of files that hold images; the download stage serves the images in them."""
    found: dict[str, str] = {}
    for facts in facts_of(context.parents["corpus"]).values():
        found |= facts.packed
    return found


def unpacked_folders(context: Context) -> dict[str, str]:
    """Return source → folder of the copies that the corpus stage made of its images."""
    names = {name for facts in facts_of(context.parents["corpus"]).values() for name in facts.unpacked}
    return dict.fromkeys(sorted(names), context.path_in("corpus", _UNPACKED))


def guard_paths(corpus: Manifest) -> list[str]:
    """Return the guards of the run, whose images filter_image drops by their hashes."""
    return sorted({path for facts in facts_of(corpus).values() for path in facts.guards})
