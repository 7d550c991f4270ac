"""What a stage that judges rows publishes: the kept rows, the drop table, and the facts of its receipt."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import polars as pl

from data_prep.accounting.drop_table import drops_path, write_drops
from data_prep.formats.parquet import ROWS_PER_GROUP, write_table
from pipeline.core.facts import Facts
from pipeline.core.stage import Context, Outcome, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCounts(Facts):
    """Rows of one source: the receipt's part of the funnel."""

    num_in: int = 0
    num_kept: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)  # drop reason → rows

    def to_json(self) -> dict[str, Any]:
        return {"in": self.num_in, "kept": self.num_kept, "dropped": dict(self.dropped)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(num_in=fields["in"], num_kept=fields["kept"], dropped=fields["dropped"])

    def __add__(self, other: "SourceCounts") -> "SourceCounts":
        dropped = dict(self.dropped)
        for reason, count in other.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
        return SourceCounts(
            num_in=self.num_in + other.num_in, num_kept=self.num_kept + other.num_kept, dropped=dropped
        )


def sources_from_json(fields: Mapping[str, Any]) -> dict[str, SourceCounts]:
    """Build source → counts from the key `sources` of a receipt's facts."""
    return {source: SourceCounts.from_json(counts) for source, counts in fields.get("sources", {}).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedFacts(Facts):
    """The facts of a task that judged rows.

    What a stage does not know is None.
    """

    source: str | None = None  # where a task has rows of one source only
    sources: Mapping[str, SourceCounts] = field(default_factory=dict)
    rules: Mapping[str, int] | None = None  # rule → version
    min_score: float | None = None
    score_minimums: Mapping[str, float] | None = None  # source → lowest score seen
    histograms: Mapping[str, Any] | None = None  # see accounting.histograms
    captions_dropped: Mapping[str, int] | None = None  # drop reason → captions that rows which stay lost
    concepts: Mapping[str, int] | None = None  # entry → rows kept that have it, of the most frequent

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(
            source=fields.get("source"),
            sources=sources_from_json(fields),
            rules=fields.get("rules"),
            min_score=fields.get("min_score"),
            score_minimums=fields.get("score_minimums"),
            histograms=fields.get("histograms"),
            captions_dropped=fields.get("captions_dropped"),
            concepts=fields.get("concepts"),
        )


def publish_judged(
    context: Context,
    task: Task,
    kept: pl.DataFrame,
    dropped: pl.DataFrame,
    facts: JudgedFacts | None = None,
    pieces: Mapping[str, pl.DataFrame] | None = None,
    rows_per_group: int = ROWS_PER_GROUP,
) -> Outcome:
    """Publish a task's kept rows and its drops (with url, key and reason), and account for both.

    `pieces` is the kept rows cut into several files, by name; without it they are one, named as the task.
    `rows_per_group` is for tables of which others read a range. `facts` need no `sources`: they are
    counted here.
    """
    outputs, digests = {}, {}
    for name, piece in (pieces or {task.name: kept}).items():
        path = f"kept/{name}.parquet"
        digests[path] = write_table(piece, context.path(path), rows_per_group)
        outputs[path] = piece.height
    counts = write_drops(dropped, context.path(drops_path(task.name)))
    return Outcome(
        {**outputs, drops_path(task.name): dropped.height},
        num_in=kept.height + dropped.height,
        num_kept=kept.height,
        dropped=counts,
        extra=replace(facts or JudgedFacts(), sources=count_by_source(kept, dropped)).to_json(),
        digests=digests,
    )


def count_by_source(kept: pl.DataFrame, dropped: pl.DataFrame) -> dict[str, SourceCounts]:
    """Count the rows in, kept and dropped by reason of each source."""
    num_kept = dict(kept.group_by("source").len().iter_rows())
    drops: dict[str, dict[str, int]] = {}
    for source, reason, count in (
        dropped.group_by("source", "reason").len().sort("source", "reason").iter_rows()
    ):
        drops.setdefault(source, {})[reason] = count
    return {
        source: SourceCounts(
            num_in=num_kept.get(source, 0) + sum(drops.get(source, {}).values()),
            num_kept=num_kept.get(source, 0),
            dropped=drops.get(source, {}),
        )
        for source in sorted({*num_kept, *drops})
    }
