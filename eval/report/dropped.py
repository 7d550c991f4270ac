"""Examples of what each rule dropped, which show whether a rule is too strict or too lax.

Drop tables hold keys. This module looks up captions in the stage's input: for `filter_text` the caption table
or a slice of it, for every later stage the table of the key's partition. It reads a bounded amount: a few
drop tables of each stage, and the first rows of a caption table.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl

from data_prep.accounting.drop_table import DETAIL, HTTP_STATUS
from data_prep.accounting.funnel import STEPS
from data_prep.corpus_facts import facts_of, malformed_table, tables_of
from data_prep.filters.text import ROWS_PER_TASK
from data_prep.formats.keys import with_key
from data_prep.sources.local_server import shown_address
from data_prep.sources.table import scan
from eval.report.data import DroppedByRule, Example
from eval.report.lookup import RowLookup
from eval.report.samples import shortened
from eval.report.sources import spread
from pipeline.core.records import InputError
from pipeline.core.stage import Context

EXAMPLES = 6  # per reason
TABLES = 8  # drop tables read per stage
ROWS = 200_000  # rows read of a caption table
SIDE_PX = 96
_COLUMNS = ("caption", "source", "url")
# Stage → the stage whose tables still have its dropped rows.
_READ_FROM = {"dedup": "dedup", "download": "dedup", "filter_image": "download"}


def dropped_by_rules(context: Context, lookup: RowLookup) -> tuple[DroppedByRule, ...]:
    """Return examples of every reason of every step, the most frequent reason first."""
    found = []
    for stage in ("corpus", *STEPS):
        if (manifest := context.parents.get(stage)) is None or not manifest.dropped:
            continue
        if stage == "corpus":
            rows = _malformed_rows(context)
        elif stage == "filter_text":
            rows = _rows_of_captions(context)
        else:
            rows = _rows(context, stage, lookup)
        for reason, total in sorted(manifest.dropped.items(), key=lambda item: (-item[1], item[0])):
            examples = [_example(row, lookup) for row in rows.get(reason, ())]
            found.append(DroppedByRule(stage, reason, total, tuple(examples)))
    return tuple(found)


def _example(row: Mapping[str, Any], lookup: RowLookup) -> Example:
    caption, url = shortened(row.get("caption")), shortened(shown_address(row.get("url") or ""))
    detail = shortened(row.get(DETAIL) or (f"HTTP {status}" if (status := row.get(HTTP_STATUS)) else ""))
    return Example(caption, str(row.get("source") or ""), url, detail, lookup.small(row, SIDE_PX))


def _rows(context: Context, stage: str, lookup: RowLookup) -> dict[str, list[dict[str, Any]]]:
    """Return reason → rows of a stage after `filter_text`, from its drop tables and its input."""
    drops: dict[str, list[dict[str, Any]]] = {}
    for path in _drop_tables(context, stage):
        some = _some_of_each(pl.scan_parquet(context.path_in(stage, path)))
        for row in some.iter_rows(named=True):
            if len(of_reason := drops.setdefault(row["reason"], [])) < EXAMPLES:
                of_reason.append(row)
    keys = [row["key"] for rows in drops.values() for row in rows]
    full = lookup.find(_READ_FROM.get(stage, "filter_image"), keys, _COLUMNS)
    return {
        reason: [full[row["key"]] | row for row in rows if row["key"] in full]
        for reason, rows in drops.items()
    }


def _malformed_rows(context: Context) -> dict[str, list[dict[str, Any]]]:
    """Return reason → the beginnings of malformed rows, which the corpus keeps in separate tables."""
    corpus = context.parents["corpus"]
    written = {shard.path for shard in corpus.shards if shard.num_samples}
    paths = {
        path: ", ".join(facts.sources)
        for task, facts in facts_of(corpus).items()
        if (path := malformed_table(task)) in written
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for path in spread(list(paths), TABLES):
        rows = pl.scan_parquet(context.path_in("corpus", path)).select("reason", "text").head(ROWS)
        some = rows.group_by("reason").agg(pl.col("text").head(EXAMPLES)).explode("text")
        for reason, text in some.sort("reason", "text").collect().iter_rows():
            if len(of_reason := found.setdefault(reason, [])) < EXAMPLES:
                of_reason.append({"caption": text, "source": paths[path]})
    return found


def _rows_of_captions(context: Context) -> dict[str, list[dict[str, Any]]]:
    """Return reason → rows dropped by `filter_text`, from the first rows of some caption tables or slices."""
    tables = tables_of(context.parents["corpus"])
    found: dict[str, list[dict[str, Any]]] = {}
    for path in _drop_tables(context, "filter_text"):
        number, _, piece = path.removeprefix("dropped/").removesuffix(".parquet").partition("-")
        place = tables[int(number)].place
        drops = pl.scan_parquet(context.path_in("filter_text", path))
        try:
            frame = scan(place.full_path(context.run_folder), place.source, is_whole=True)
            frame = frame.slice(int(piece or 0) * ROWS_PER_TASK, ROWS).select(*_COLUMNS)
            # Keys may come from normalised captions; the form that matches shows which.
            for normalise in (False, True):
                keyed = with_key(frame, normalise=normalise).join(drops, on="key", how="inner")
                some = _some_of_each(keyed)
                if some.height:
                    break
        except (InputError, OSError, pl.exceptions.ComputeError):  # a table outside the run has been moved
            continue
        for row in some.iter_rows(named=True):
            if len(of_reason := found.setdefault(row["reason"], [])) < EXAMPLES:
                of_reason.append(row)
    return found


def _some_of_each(rows: pl.LazyFrame) -> pl.DataFrame:
    """Return the first rows of each reason, by key."""
    names = [name for name in rows.collect_schema().names() if name != "reason"]
    some = rows.group_by("reason").agg(pl.col(names).sort_by("key").head(EXAMPLES))
    return some.explode(names).collect(engine="streaming").sort("reason", "key")


def _drop_tables(context: Context, stage: str) -> list[str]:
    paths = [
        shard.path
        for shard in context.parents[stage].shards
        if shard.path.startswith("dropped/") and shard.num_samples
    ]
    return spread(paths, TABLES)
