"""Follows every row: the funnel of a run, and whether the demo's funnel equals what was planted."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import polars as pl

from data_prep.accounting.judged import JudgedFacts, SourceCounts, sources_from_json
from data_prep.corpus_facts import ROW_STAGES, TablePlace, tables_of
from data_prep.formats.keys import with_key
from data_prep.rules.text import SCORE_BELOW_THRESHOLD
from data_prep.sources.table import scan
from pipeline.core import store
from pipeline.core.records import Manifest
from pipeline.core.stage import Context

# Stages that drop rows, in order, if a run has them; a corpus drops the malformed rows of its sources.
STEPS = ("filter_text", "dedup", "download", *ROW_STAGES)


def by_source(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return source → {in, kept, dropped{reason: rows}} of a finished stage, summed over its tasks."""
    totals: dict[str, SourceCounts] = {}
    for extra in manifest.extra.values():
        for source, counts in sources_from_json(extra).items():
            totals[source] = totals.get(source, SourceCounts()) + counts
    return {source: total.to_json() for source, total in sorted(totals.items())}


@dataclass(frozen=True, slots=True)
class NoOpThreshold:
    """A stage's threshold on scores that every row of a source passes; `str` gives a sentence."""

    stage: str
    source: str
    threshold: float
    minimum: float  # the lowest score of the source

    def __str__(self) -> str:
        return (
            f"{self.stage}: the threshold {self.threshold:g} on scores is a no-op for {self.source}:"
            f" the minimum seen is {self.minimum:.4f}"
        )


def no_op_thresholds(manifest: Manifest) -> list[NoOpThreshold]:
    """Return the sources in which every row passes a stage's threshold on scores.

    LAION-5B contains only pairs that its own encoders scored high enough, so the paper's 0.26 can be a no-op.
    """
    lowest: dict[str, float] = {}
    threshold = None
    for extra in manifest.extra.values():
        facts = JudgedFacts.from_json(extra)
        for source, score in (facts.score_minimums or {}).items():
            lowest[source] = min(score, lowest.get(source, score))
            threshold = facts.min_score
    counts = by_source(manifest)
    return [
        NoOpThreshold(manifest.stage, source, threshold, score)
        for source, score in sorted(lowest.items())
        if str(SCORE_BELOW_THRESHOLD) not in counts.get(source, {}).get("dropped", {})
        and threshold is not None
        and score >= threshold - 1e-6  # rows that an earlier rule drops are seen, but not judged
    ]


def lost_captions(manifest: Manifest) -> str | None:
    """Return a sentence on the captions that rows with several lost although they stay; None for none."""
    totals = Counter[str]()
    for extra in manifest.extra.values():
        totals.update(JudgedFacts.from_json(extra).captions_dropped or {})
    if not totals:
        return None
    counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(totals.items()))
    return f"{manifest.stage}: rows that stay lost {totals.total():,} of their captions: {counts}"


@dataclass(frozen=True, slots=True)
class PlantedCount:
    """A class of rows that the demo planted: its written fate and how many rows met it."""

    name: str
    stage: str
    fate: str
    planted: int
    counted: int


def count_planted(context: Context) -> list[PlantedCount]:
    """Follow each planted row to its end by its key; empty for a corpus that plants nothing.

    A row's end is the reason in the drop tables, else `duplicate` for the copies that dedup removed, else
    `kept` where its key is in the shards.
    """
    path = context.path_in("corpus", "planted.parquet")
    if not store.exists(path):
        return []
    rows = pl.concat([_keyed(context, table.place) for table in tables_of(context.parents["corpus"])])
    rows = rows.join(pl.read_parquet(path), on="SAMPLE_ID", validate="1:1")
    dropped = {stage: _dropped(context, stage) for stage in STEPS if stage in context.parents}
    reasons = pl.concat([rows for stage, rows in dropped.items() if stage != "dedup"]).unique("key")
    packed = [stage for stage in ("shards", "validation") if stage in context.parents]
    kept = [shard.path for stage in packed for shard in context.shards_of(stage, ".parquet")]
    keys = pl.scan_parquet(kept).select("key", in_shards=pl.lit(True)).collect()
    ends = (
        rows.join(reasons, on="key", how="left")
        .join(dropped["dedup"].unique("key").rename({"reason": "copy"}), on="key", how="left")
        .join(keys, on="key", how="left")
        .with_columns(
            end=pl.coalesce(
                "reason",
                # The first row of a pair and its copies share the key: the copies are the planted ones.
                pl.when(pl.col("stage") == "dedup").then("copy"),
                pl.when(pl.col("in_shards")).then(pl.lit("kept")),
            )
        )
    )
    counts = ends.group_by("planted", "stage", "fate", maintain_order=True).agg(
        total=pl.len(), met=(pl.col("end") == pl.col("fate")).sum()
    )
    order = {stage: position for position, stage in enumerate(STEPS)}
    found = [
        PlantedCount(name, stage or "", fate, total, met)
        for name, stage, fate, total, met in counts.iter_rows()
    ]
    return sorted(found, key=lambda item: (order.get(item.stage, len(order)), item.name))


def _keyed(context: Context, table: TablePlace) -> pl.DataFrame:
    path = table.full_path(context.run_folder)
    ids = pl.scan_parquet(path).select("SAMPLE_ID")
    return pl.concat(
        [with_key(scan(path, table.source, is_whole=True)).select("key"), ids], how="horizontal"
    ).collect()


def _dropped(context: Context, stage: str) -> pl.DataFrame:
    paths = [shard.path for shard in context.shards_of(stage) if "/dropped/" in shard.path]
    return pl.concat([pl.read_parquet(path, columns=["key", "reason"]) for path in paths])
