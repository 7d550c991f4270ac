"""`cnclip why`: finds the fate of a row in tables and drop tables.

The user names a row by its key, by its image's URL, or, if the image is on disk, by the path. Rows that never
reached their source's caption table are looked up in the corpus stage's drop tables by the plain key of
address and caption, and malformed ones by the address in the kept part of their text.
"""

import functools
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from data_prep.accounting.drop_table import DETAIL, HTTP_STATUS, drops_path
from data_prep.accounting.funnel import STEPS
from data_prep.accounting.judged import JudgedFacts
from data_prep.corpus_facts import facts_of, malformed_table, tables_of
from data_prep.dedup.exact import DUPLICATE
from data_prep.filters.text import FilterTextConfig, by_exemptions, prepared, rows_of_task, task_names
from data_prep.formats.keys import url_hash
from data_prep.rules import text as text_rules
from data_prep.rules.address import AROUND
from data_prep.sources.local_server import HOST, IMAGES, shown_address
from data_prep.sources.regions import JOINED
from data_prep.sources.table import scan
from pipeline.core import store
from pipeline.core.evaluation_sets import SET_ASIDE
from pipeline.core.failures import PARTITION_FAILED
from pipeline.core.records import InputError, Manifest
from pipeline.core.run import Run
from pipeline.core.stage import Task
from pipeline.executors.anywhere import map_anywhere
from pipeline.tools.key_tables import KeyTables

_KEY = re.compile(r"[0-9a-f]{32}")
_SERVED = re.compile(
    r"http://127\.0\.0\.1:\d+/[^/]+/(.+)"
)  # an address of the run's own server, with its token
_FEW_ROWS = 2_000_000  # of caption tables that are read here: other processes take as long to start
_FEW_TABLES = 64  # drop tables that are read here, or by one task
# How the corpus stage writes a file's path into an address.
_ESCAPES = str.maketrans({"%": "%25", "#": "%23", "?": "%3F"})


@dataclass(frozen=True, slots=True)
class Fate:
    """The fate of a row."""

    key: str | None  # None: a malformed row, which has none
    source: str
    row: int | None  # in its source's table; None: it never reached one
    url: str | None
    caption: str | None
    stage: str | None  # the stage that dropped it; None: it is kept
    reason: str | None
    detail: str | None  # more on the reason, in words
    place: str | None  # where the sample is, if it is packed
    text: str | None = None  # a malformed row as read, or the text that further captions joined
    count: int = 1  # rows of one image that share this fate

    def lines(self) -> list[str]:
        """Return the fate in two lines."""
        if self.stage == "corpus" and self.text is not None:
            if self.reason == JOINED:
                head = f"{self.source}: {self.count} further captions of one image"
                return [head, f"  dropped by corpus: {self.reason} (part of the text {self.text})"]
            return [f"{self.source}  {self.text!r}", f"  dropped by corpus: {self.reason}"]
        if self.row is None:
            return [f"{self.key}  {self.source}", f"  dropped by {self.stage}: {self.reason}"]
        head = f"{self.key}  {self.source} row {self.row}  {_shown(self.url)}  {self.caption or ''!r}"
        if self.stage is not None:
            detail = f" ({self.detail})" if self.detail else ""
            return [head, f"  dropped by {self.stage}: {self.reason}{detail}"]
        if self.place is None:
            return [head, "  kept so far; the shards are not made yet"]
        is_aside = f"/{SET_ASIDE}/" in self.place
        return [head, f"  {'set aside by [split], never trained on' if is_aside else 'kept'}: {self.place}"]


def explain(run: Run, config: FilterTextConfig, asked: str) -> list[str]:
    """Return lines that describe the fate of each row that `follow` finds."""
    return [line for fate in follow(run, config, asked) for line in fate.lines()]


def follow(run: Run, config: FilterTextConfig, asked: str) -> list[Fate]:
    """Return the fate of each row with this key, URL or path of an image on disk.

    A path is one in the caption table, or the file's path, absolute or relative to the working directory.

    Raises:
        InputError: if the corpus stage is not done, or no table has such a row.
    """
    tables = KeyTables(run)
    corpus = tables.manifest("corpus")
    if corpus is None:
        raise InputError(f"{run.folder}: the corpus stage is not done; run it first")
    urls = _urls(corpus, asked)
    rows = _find_rows(run, tables, corpus, config, asked, urls)
    fates = list(_dropped_by_corpus(run, corpus, asked, urls))
    if rows.height == 0 and not fates:
        raise InputError(
            f"{_shown(asked)}: not in any caption table of {run.folder}; give a key, a whole URL,"
            " or the path of an image on disk"
        )
    return fates + [_fate(tables, config, row) for row in rows.iter_rows(named=True)]


def _urls(corpus: Manifest, asked: str) -> list[str]:
    """Return the addresses that tables may hold for the request: itself, and those of an image on disk."""
    if (served := _SERVED.fullmatch(asked)) is not None:
        return [asked, f"http://{HOST}/{served[1]}"]
    bare = asked.strip(AROUND)  # as tables are read
    found = [asked, bare, *(f"{scheme}:{bare}" for scheme in ("http", "https") if bare.startswith("//"))]
    for source in (table.place.source for table in tables_of(corpus)):
        if source.picture_folder is not None:
            for path in (asked, *_paths_below(source.picture_folder, asked)):
                found.append(f"http://{HOST}/{IMAGES}/{source.name}/{path.translate(_ESCAPES)}")
    return list(dict.fromkeys(found))


def _paths_below(folder: str, asked: str) -> list[str]:
    """Return how a table may name a file of its image folder; empty for a file outside it."""
    if not store.is_local(folder):
        prefix = folder.rstrip("/") + "/"
        return [asked.removeprefix(prefix)] if asked.startswith(prefix) else []
    found = []
    for plain in (os.path.abspath, os.path.realpath):  # the path may go through links, unlike the table's
        path, root = plain(asked), plain(folder)
        if path.startswith(root.rstrip(os.sep) + os.sep):
            relative = os.path.relpath(path, root)
            found += [relative, os.path.join(".", relative)]
    return found


def _shown(url: str | None) -> str:
    """Return an address for a terminal, with control and direction characters escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in (shown_address(url) if url else "(no address)")
    )


def _find_rows(
    run: Run,
    tables: KeyTables,
    corpus: Manifest,
    config: FilterTextConfig,
    asked: str,
    urls: Collection[str],
) -> pl.DataFrame:
    if not _KEY.fullmatch(asked):
        found = list(rows_of_tables(run, corpus, config, pl.col("url").is_in(urls)))
    else:
        places = _places_of_key(run, tables, asked)
        found = list(rows_of_tables(run, corpus, config, pl.col("key") == asked, places))
    return pl.concat(found).sort("file", "row") if found else pl.DataFrame()


def _places_of_key(run: Run, tables: KeyTables, key: str) -> list[tuple[int, int | None, int | None]] | None:
    """Return the rows of caption tables that may have a key: table, first row, number of rows (None: all).

    None while the rows are not shuffled yet: any row may have it. A key leads to one partition of the
    shuffled rows, which also says whether dedup dropped copies. A key that is not there belongs to a row that
    `filter_text` dropped, or to one of a task that the run continued without, if to any.
    """
    if tables.manifest("dedup") is None:
        return None
    kept = tables.find("dedup", "kept/", key, ("file", "row"))
    if kept is not None and tables.find("dedup", "dropped/", key, ("reason",)) is None:
        return [(kept["file"], kept["row"], 1)]
    if kept is not None:  # tables of text that is kept are sorted by key: row groups without it are not read
        copies = _tables_with_key(run, tables.all("filter_text", "kept/"), key)
        return [rows_of_task(name) for name in copies]
    dropped = _tables_with_key(run, tables.all("filter_text", "dropped/"), key)
    return [rows_of_task(name) for name in (*dropped, *_failed_tasks(tables))]


def _tables_with_key(run: Run, paths: list[str], key: str) -> list[str]:
    """Return the names of the tasks whose tables have a row with a key."""
    groups = [paths[start : start + _FEW_TABLES] for start in range(0, len(paths), _FEW_TABLES)]
    tasks = [Task(f"{number:05d}", {}, {"paths": group}) for number, group in enumerate(groups)]
    look = functools.partial(_look_for_key, key)
    found = map(look, tasks) if len(tasks) == 1 else map_anywhere(run, look, tasks)
    return sorted(name for item in found for name in item.names)


@dataclass(frozen=True, slots=True)
class _Holding:
    """The tasks of a stage, among some, whose tables have a key."""

    task: str
    names: tuple[str, ...]


def _look_for_key(key: str, task: Task) -> _Holding:
    names = []
    for path in task.arguments["paths"]:
        found = pl.scan_parquet(path).filter(key=key).select(pl.len()).collect(engine="streaming").item()
        if found:
            names.append(os.path.basename(path).removesuffix(".parquet"))
    return _Holding(task.name, tuple(names))


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a caption table that are asked for."""

    task: str
    rows: pl.DataFrame


def rows_of_tables(
    run: Run,
    corpus: Manifest,
    config: FilterTextConfig,
    wanted: pl.Expr,
    places: Collection[tuple[int, int | None, int | None]] | None = None,
) -> Iterator[pl.DataFrame]:
    """Yield the matching rows of each caption table with key, url, caption, source, row and score.

    `places` are the rows that may match: table, first row and number of rows, both None for all; None: any.
    Large tables are read by the run's executor.
    """
    tables = tables_of(corpus)
    if places is None:
        places = [(number, None, None) for number in range(len(tables))]
    tasks = [
        Task(
            f"{number:05d}",
            {},
            {"place": tables[table].place, "number": table, "first": first, "count": count},
        )
        for number, (table, first, count) in enumerate(places)
    ]
    num_rows = sum(tables[table].num_rows if count is None else count for table, _, count in places)
    read = functools.partial(_read_rows, run.folder, config, wanted)
    for item in map(read, tasks) if num_rows <= _FEW_ROWS else map_anywhere(run, read, tasks):
        yield item.rows


def _read_rows(folder: str, config: FilterTextConfig, wanted: pl.Expr, task: Task) -> _Rows:
    asked = task.arguments
    path, source = asked["place"].full_path(folder), asked["place"].source
    frame = scan(path, source, is_whole=True, first=asked["first"] or 0, count=asked["count"])
    groups = by_exemptions(frame, source)
    rows = pl.concat([prepared(part, config, exempt) for exempt, part in groups]).filter(wanted)
    columns = ("key", "url", "caption", "source", "row", "score", "language")
    return _Rows(task.name, rows.select(*columns, file=pl.lit(asked["number"])).collect(engine="streaming"))


def _dropped_by_corpus(run: Run, corpus: Manifest, asked: str, urls: Collection[str]) -> Iterator[Fate]:
    """Yield the fates of source rows that are in no caption table."""
    is_key = _KEY.fullmatch(asked) is not None
    hashes = pl.DataFrame({"url": urls}).select(url_hash()).to_series()
    wanted = pl.col("key") == asked if is_key else pl.col("url_hash").is_in(hashes.implode())
    # A longer address or path that contains it is a different one.
    inside = re.compile(rf"""(?<![\w./%-]){re.escape(asked)}(?=[\s,"'\\]|$)""")
    written = {shard.path for shard in corpus.shards if shard.num_samples}
    for task, facts in facts_of(corpus).items():
        source = ", ".join(facts.sources)
        if (path := drops_path(task)) in written:
            table = pl.scan_parquet(store.join(run.folder, "corpus", path))
            found = table.filter(wanted).collect().sort("reason", DETAIL, "key")
            for (reason, text), rows in found.group_by("reason", DETAIL, maintain_order=True):
                if reason == JOINED:
                    yield _without_row(source, reason, text=str(text), count=rows.height)
                    continue
                for key in rows["key"]:
                    yield _without_row(source, reason, key=key)
        if not is_key and (path := malformed_table(task)) in written:
            table = pl.scan_parquet(store.join(run.folder, "corpus", path))
            holds = pl.col("text").str.contains(asked, literal=True)
            for reason, text in table.filter(holds).select("reason", "text").collect().iter_rows():
                if inside.search(text):
                    yield _without_row(source, reason, text=text)


def _without_row(
    source: str, reason: str, *, key: str | None = None, text: str | None = None, count: int = 1
) -> Fate:
    """Return the fate of a row that the corpus stage dropped."""
    return Fate(key, source, None, None, None, "corpus", reason, None, None, text, count)


def _fate(tables: KeyTables, config: FilterTextConfig, row: dict[str, Any]) -> Fate:
    key = row["key"]
    stage, reason, detail, place = None, None, None, None
    kept = tables.find("dedup", "kept/", key, ("file", "row"))
    is_first = kept is not None and (kept["file"], kept["row"]) == (row["file"], row["row"])
    if (failed := _failed_task(tables, row)) is not None:
        stage, reason = "filter_text", str(PARTITION_FAILED)
        detail = f"the run continued without task {failed}"
    elif not is_first and (found := _dropped_text(tables, row)) is not None:
        stage, reason = "filter_text", found["reason"]
        detail = _detail(config, reason, found.get(DETAIL), row)
    elif kept is not None and not is_first:
        stage, reason = "dedup", str(DUPLICATE)
        detail = "a lower table and row has the same URL and caption"
    elif (later := _dropped_image(tables, key)) is not None:  # the fate of the image
        stage, reason, detail = later
    else:
        place = tables.shard_of(key)
    return Fate(key, row["source"], row["row"], row["url"], row["caption"], stage, reason, detail, place)


def _failed_task(tables: KeyTables, row: dict[str, Any]) -> str | None:
    """Return the task of filter_text that was to judge a row and failed; such tasks have no drop table."""
    failed = _failed_tasks(tables)
    return next((task for task in task_names(row["file"], row["row"]) if task in failed), None)


def _failed_tasks(tables: KeyTables) -> list[str]:
    """Return the tasks of filter_text that the run continued without."""
    manifest = tables.manifest("filter_text")
    if manifest is None or PARTITION_FAILED not in manifest.dropped:
        return []
    return [
        task
        for task, extra in manifest.extra.items()
        if any(PARTITION_FAILED in item.dropped for item in JudgedFacts.from_json(extra).sources.values())
    ]


def _dropped_text(tables: KeyTables, row: dict[str, Any]) -> Mapping[str, Any] | None:
    """Return a row of the drop table of the task that judged a row, if it dropped the row."""
    hashed = pl.DataFrame({"url": [row["url"] or ""]}).select(url_hash()).item()
    paths = [drops_path(task) for task in task_names(row["file"], row["row"])]
    for path in tables.among("filter_text", paths):
        # Drop tables are sorted by URL hash, so other row groups are skipped without reading.
        found = pl.scan_parquet(path).filter(url_hash=hashed, key=row["key"]).collect()
        if found.height:
            return found.row(0, named=True)
    return None


def _dropped_image(tables: KeyTables, key: str) -> tuple[str, str, str | None] | None:
    """Return the stage that dropped the image of a row, the reason and more on it."""
    for stage in STEPS[2:]:
        found = tables.find(stage, "dropped/", key)
        if found is not None:
            status = found.get(HTTP_STATUS)
            return stage, found["reason"], found.get(DETAIL) or (str(status) if status else None)
    return None


def _detail(config: FilterTextConfig, reason: str, detail: str | None, row: dict[str, Any]) -> str | None:
    """Return the detail of a drop: a word from the drop table (lists may change), the rest from the row."""
    caption = str(row["caption"] or "").strip()
    if detail is not None:
        return f"the word {detail!r}"
    if reason == text_rules.SCORE_BELOW_THRESHOLD:
        return f"{row['score']:.4f} < {config.min_score}"
    if reason in (text_rules.TOO_SHORT, text_rules.TOO_LONG):
        return f"{len(caption)} characters; {config.min_characters} to {config.max_characters} stay"
    if reason == text_rules.LANGUAGE:
        return str(row["language"])
    return None
