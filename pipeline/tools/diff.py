"""`cnclip diff`: compares two builds of a corpus by their lock files, sidecars and drop tables.

Rows with the same key (a digest of address and caption) are the same row. Sidecars are sorted by key, so both
corpora are read in parallel, and memory holds some shards and the differing rows of a batch.
"""

import bisect
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from data_prep.accounting.funnel import STEPS
from data_prep.dedup.exact import DUPLICATE
from data_prep.formats.keys import url_hash
from data_prep.shards.lock import LOCK_FILE
from data_prep.sources.regions import JOINED
from pipeline.core import store
from pipeline.core.files.foreign import parse_json
from pipeline.core.files.written import parquet_rows
from pipeline.core.records import InputError
from pipeline.core.run import Run, read_manifest
from pipeline.core.text_table import align

_ROWS_AT_ONCE = 250_000  # of the larger corpus per step
_BATCH_ROWS = 2_000_000  # differing rows per look-up in the other build's drop tables
_COLUMNS = ("key", "url", "caption", "source", "image_sha256")
_NOT_THERE = ("corpus", "not_in_sources")
_SET_ASIDE = ("split", "validation")
Side = Literal["A", "B"]
# Columns of the table of rows that only one build has; `in` says which.
_ROWS_SCHEMA = pa.schema(
    [(name, pa.large_string()) for name in ("in", "key", "url", "caption", "source", "stage", "reason")]
)


@dataclass(frozen=True, slots=True)
class Build:
    """A finished corpus: its lock file and the files of its run."""

    run: Run
    lock: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str) -> "Build":
        """Open the corpus in a run's folder.

        Raises:
            InputError: if its lock file is missing or damaged.
        """
        path = store.join(folder, "lock", LOCK_FILE)
        if not store.exists(path):
            raise InputError(f"{path}: no such file; finish the corpus with `cnclip run RUN.toml --to lock`")
        try:
            lock = parse_json(store.read_text(path))
            funnel = lock["funnel"]
            if not all({"in", "kept", "dropped", "sources"} <= step.keys() for step in funnel.values()):
                raise KeyError("a step without its counts")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{path}: no lock file of a corpus; redo it with --stage lock --redo") from None
        return cls(Run(folder, 0, "local", 1, ()), lock)

    def files(self, stage: str, prefix: str = "") -> list[str]:
        """Return the tables that a stage published below `prefix`; empty without such a stage."""
        manifest = read_manifest(self.run, stage)
        return [
            store.join(self.run.folder, stage, shard.path)
            for shard in (manifest.shards if manifest else ())
            if shard.path.startswith(prefix) and shard.path.endswith(".parquet") and shard.num_samples
        ]


@dataclass(slots=True)
class RowChanges:
    """Counts of the rows of two corpora's training shards by their fate."""

    num_rows: dict[Side, int] = field(default_factory=dict)
    kept_by_both: int = 0
    other_image: int = 0  # of those, rows with different stored bytes of the image
    other_caption: int = 0
    # Side that has the rows → (stage, reason) for which the other side lacks them → number of rows.
    missing: dict[Side, Counter[tuple[str, str]]] = field(
        default_factory=lambda: {"A": Counter(), "B": Counter()}
    )


def compare(folder_a: str, folder_b: str, rows_path: str | None = None) -> list[str]:
    """Return lines that describe how corpus B differs from corpus A.

    A Parquet table at `rows_path` lists the rows that only one of them has: in (A or B), key, url, caption,
    source, and the other build's stage and reason.

    Raises:
        InputError: if a build is not finished, or if rows are asked for and the builds make keys differently.
    """
    a, b = Build.open(folder_a), Build.open(folder_b)
    lines = [f"A  {folder_a}", f"B  {folder_b}", ""]
    lines += _titled("sources", _source_changes(a.lock, b.lock))
    lines += _titled("settings", _value_changes(a.lock["settings"], b.lock["settings"]))
    lines += _titled("versions of rules", _value_changes(a.lock["rules"], b.lock["rules"]))
    lines += ["rows through each stage", *_funnel_changes(a.lock["funnel"], b.lock["funnel"]), ""]
    if _normalises(a) != _normalises(b):
        without = "rows are not compared: filter_text.normalise_duplicates differs, so their keys differ"
        if rows_path is not None:
            raise InputError(f"{folder_a} and {folder_b}: {without}; leave out --rows")
        return [*lines, without]
    changes = row_changes(a, b, rows_path)
    lines += [
        f"rows in training shards: {changes.num_rows['A']:,} in A, {changes.num_rows['B']:,} in B",
        f"kept by both: {changes.kept_by_both:,} rows, of them {changes.other_image:,} with another image"
        f" and {changes.other_caption:,} with another caption",
    ]
    sides: tuple[tuple[Side, str], ...] = (("A", "B"), ("B", "A"))
    for side, other in sides:
        found = changes.missing[side]
        lines.append(f"only in {side}: {sum(found.values()):,} rows")
        lines += [
            f"  {count:,} {_why_missing(stage, reason, other)}"
            for (stage, reason), count in sorted(found.items(), key=lambda item: (-item[1], item[0]))
        ]
    return lines


def _normalises(build: Build) -> bool:
    return bool(build.lock["settings"].get("filter_text", {}).get("normalise_duplicates", False))


def _why_missing(stage: str, reason: str, other: str) -> str:
    if (stage, reason) == _NOT_THERE:
        return f"not among the rows of {other}'s sources"
    if (stage, reason) == _SET_ASIDE:
        return f"set aside for validation in {other}"
    return f"dropped by {other}'s {stage}: {reason}"


def _titled(title: str, lines: list[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines or ["the same"]), ""]


def _source_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    tables_a, tables_b = (
        {(item["source"], item["table"]): item for item in lock["sources"]} for lock in (a, b)
    )
    lines = []
    for name in sorted({*tables_a, *tables_b}):
        label = f"{name[0]}  {name[1]}"
        if name not in tables_b:
            lines.append(f"only in A: {label}, {tables_a[name]['rows']:,} rows")
        elif name not in tables_a:
            lines.append(f"only in B: {label}, {tables_b[name]['rows']:,} rows")
        elif tables_a[name]["digest"] != tables_b[name]["digest"]:
            rows = f"{tables_a[name]['rows']:,} → {tables_b[name]['rows']:,} rows"
            lines.append(f"other bytes: {label}, {rows}")
    return lines


def _value_changes(a: Any, b: Any) -> list[str]:
    values_a, values_b = dict(_leaves(a, "")), dict(_leaves(b, ""))
    return [
        f"{key}: {_shown(values_a.get(key))} → {_shown(values_b.get(key))}"
        for key in sorted({*values_a, *values_b})
        if values_a.get(key) != values_b.get(key)
    ]


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{name}.{number}")
    else:
        yield name, value


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


def _funnel_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return rows in, kept, and dropped by reason in A and B, for each stage and source."""
    rows = [("stage", "source", "rows", "A", "B", "B - A")]
    for stage in [name for name in ("corpus", *STEPS) if name in a or name in b]:
        of_a, of_b = (funnel.get(stage, {"sources": {}})["sources"] for funnel in (a, b))
        for source in sorted({*of_a, *of_b}):
            counts = [
                {"in": one["in"], **{f"- {reason}": n for reason, n in one["dropped"].items()}}
                | {"kept": one["kept"]}
                for one in (of.get(source, {"in": 0, "kept": 0, "dropped": {}}) for of in (of_a, of_b))
            ]
            reasons = sorted({*counts[0], *counts[1]} - {"in", "kept"})
            for what in ("in", *reasons, "kept"):
                before, after = (count.get(what, 0) for count in counts)
                change = f"{after - before:+,}" if after != before else ""
                rows.append((stage, source, what, f"{before:,}", f"{after:,}", change))
    return align(rows, (False, False, False, True, True, True)).splitlines()


def row_changes(a: Build, b: Build, rows_path: str | None = None) -> RowChanges:
    """Compare the rows of both corpora's training shards."""
    sidecars_a, sidecars_b = _Sidecars.of(a), _Sidecars.of(b)
    changes = RowChanges(num_rows={"A": sidecars_a.num_rows, "B": sidecars_b.num_rows})
    with contextlib.ExitStack() as stack:
        writer = None
        if rows_path is not None:
            writer = stack.enter_context(parquet_rows(rows_path, _ROWS_SCHEMA))
        only: dict[Side, list[pl.DataFrame]] = {"A": [], "B": []}
        others: tuple[tuple[Side, Build], ...] = (("A", b), ("B", a))

        def look_up() -> None:
            for side, other in others:
                if only[side]:
                    found = _with_fate(pl.concat(only[side]), other)
                    counts = found.group_by("stage", "reason").len()
                    changes.missing[side].update(
                        {(stage, reason): count for stage, reason, count in counts.iter_rows()}
                    )
                    if writer is not None:
                        writer.write_table(_table_of(found, side))
                    only[side].clear()

        for first, end in _ranges(sidecars_a, sidecars_b):
            rows_a, rows_b = sidecars_a.rows(first, end), sidecars_b.rows(first, end)
            compared = ("key", "caption", "image_sha256")
            both = rows_a.select(compared).join(rows_b.select(compared), on="key", suffix="_b")
            changes.kept_by_both += both.height
            changes.other_image += int((both["image_sha256"] != both["image_sha256_b"]).sum())
            changes.other_caption += int((both["caption"] != both["caption_b"]).sum())
            only["A"].append(rows_a.join(rows_b, on="key", how="anti").drop("image_sha256"))
            only["B"].append(rows_b.join(rows_a, on="key", how="anti").drop("image_sha256"))
            if sum(frame.height for frames in only.values() for frame in frames) >= _BATCH_ROWS:
                look_up()
        look_up()
    return changes


@dataclass(frozen=True, slots=True)
class _Sidecars:
    """The sidecars of a corpus's training shards, and the first key of each."""

    paths: list[str]
    first_keys: list[str]
    num_rows: int

    @classmethod
    def of(cls, build: Build) -> "_Sidecars":
        paths = build.files("shards")
        heads = [pl.scan_parquet(path).select("key").head(1) for path in paths]
        keys = pl.concat(heads).collect()["key"].to_list() if heads else []
        manifest = read_manifest(build.run, "shards")
        if manifest is None:
            raise InputError(f"{build.run.folder}: its shards are not finished; run it with --to lock")
        return cls(paths, keys, manifest.num_kept)

    def rows(self, first: str, end: str | None) -> pl.DataFrame:
        """Return the rows with keys from `first` to below `end` (None: no end)."""
        begin = max(0, bisect.bisect_right(self.first_keys, first) - 1)
        stop = len(self.paths) if end is None else bisect.bisect_left(self.first_keys, end)
        condition = pl.col("key") >= first
        if end is not None:
            condition &= pl.col("key") < end
        schema = dict.fromkeys(_COLUMNS, pl.String)
        frames = [
            pl.scan_parquet(path).select(*_COLUMNS).filter(condition).cast(schema)  # type: ignore[arg-type]
            for path in self.paths[begin:stop]
        ]
        return pl.concat(frames).collect() if frames else pl.DataFrame(schema=schema)


def _ranges(a: _Sidecars, b: _Sidecars) -> Iterator[tuple[str, str | None]]:
    """Yield ranges of keys in order, each with about _ROWS_AT_ONCE rows of the larger corpus."""
    larger = a if a.num_rows >= b.num_rows else b
    shards_at_once = max(1, len(larger.paths) * _ROWS_AT_ONCE // max(larger.num_rows, 1))
    bounds = ["", *larger.first_keys[shards_at_once::shards_at_once], None]
    for first, end in itertools.pairwise(bounds):
        assert first is not None
        yield first, end


def _with_fate(rows: pl.DataFrame, other: Build) -> pl.DataFrame:
    """Return rows with the stage and reason for which another build lacks them, the last stage if several."""
    first, last = rows["key"].min(), rows["key"].max()
    wanted = rows.lazy().select("key")
    # Captions of one image are joined after some were dropped, so keys differ and the address counts. A
    # joined caption is not a reason, because its image's text is in the table.
    addresses = rows.lazy().select("key", url_hash().alias("url_hash"))
    found = [
        pl.scan_parquet(path)
        .select("url_hash", "reason")
        .filter(pl.col("reason") != JOINED)
        .unique()
        .join(addresses, on="url_hash")
        .select("key", "reason", stage=pl.lit("corpus"), order=pl.lit(-1))
        for path in other.files("corpus", "dropped/")
    ]
    found += [
        pl.scan_parquet(path)
        .select("key", "reason")
        .filter(pl.col("key").is_between(pl.lit(first), pl.lit(last)), pl.col("reason") != DUPLICATE)
        .join(wanted, on="key", how="semi")
        .with_columns(stage=pl.lit(stage), order=pl.lit(order))
        for order, stage in enumerate(STEPS)
        for path in other.files(stage, "dropped/")
    ]
    found += [
        pl.scan_parquet(path)
        .select("key")
        .join(wanted, on="key", how="semi")
        .with_columns(reason=pl.lit(_SET_ASIDE[1]), stage=pl.lit(_SET_ASIDE[0]), order=pl.lit(len(STEPS)))
        for path in other.files("validation")
    ]
    rows = rows.with_columns(stage=pl.lit(_NOT_THERE[0]), reason=pl.lit(_NOT_THERE[1]))
    if not found:
        return rows
    fates = (
        pl.concat(found)
        .collect(engine="streaming")
        .sort("key", "order", "reason", descending=[False, True, False])
        .unique("key", keep="first")
        .select("key", "stage", "reason")
    )
    return rows.update(fates, on="key")


def _table_of(rows: pl.DataFrame, side: Side) -> pa.Table:
    marked = rows.select(pl.lit(side).alias("in"), *_ROWS_SCHEMA.names[1:])
    table: pa.Table = marked.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(_ROWS_SCHEMA)
    return table
