"""`cnclip why`: find what became of a row, from tables and drop tables.

Rows that never reached their source's caption table are looked up in the corpus stage's drop tables, by the
plain key of address and caption; malformed ones by the address in the part of their text that is kept.
"""

import re
from collections.abc import Iterator

import polars as pl

from data_prep.accounting.drop_table import DETAIL, HTTP_STATUS, drops_path
from data_prep.accounting.funnel import STEPS
from data_prep.corpus_facts import facts_of, malformed_table, tables_of
from data_prep.filters.text import FilterTextConfig, by_exemptions, prepared
from data_prep.formats.keys import url_hash
from data_prep.rules import text as text_rules
from data_prep.sources.regions import JOINED
from data_prep.sources.table import scan
from pipeline.core import store
from pipeline.core.records import InputError, Manifest
from pipeline.core.run import Run, read_manifest

_KEY = re.compile(r"[0-9a-f]{32}")


def explain(run: Run, config: FilterTextConfig, key_or_url: str) -> list[str]:
    """Return lines that say what became of each row with this key or URL; InputError if no table has it."""
    corpus = read_manifest(run, "corpus")
    if corpus is None:
        raise InputError(f"{run.folder}: the corpus stage is not done; run it first")
    rows = _find_rows(run, corpus, config, key_or_url)
    lines = list(_dropped_by_corpus(run, corpus, key_or_url))
    if rows.height == 0 and not lines:
        raise InputError(
            f"{_shown(key_or_url)}: not in any caption table of {run.folder}; give a key or a whole URL"
        )
    for row in rows.iter_rows(named=True):
        lines.append(
            f"{row['key']}  {row['source']} row {row['row']}  {_shown(row['url'])}  {row['caption']!r}"
        )
        lines += [f"  {line}" for line in _fate(run, config, row)]
    return lines


def _shown(url: str | None) -> str:
    """Return an address for a terminal, with control and direction characters written out."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in url or "(no address)"
    )


def _find_rows(run: Run, corpus: Manifest, config: FilterTextConfig, key_or_url: str) -> pl.DataFrame:
    wanted = pl.col("key" if _KEY.fullmatch(key_or_url) else "url") == key_or_url
    found = []
    for number, table in enumerate(tables_of(corpus)):
        path, source = table.place.full_path(run.folder), table.place.source
        groups = by_exemptions(scan(path, source), source)
        frame = pl.concat([prepared(part, config, exempt) for exempt, part in groups]).filter(wanted)
        columns = ("key", "url", "caption", "source", "row", "score", "language")
        found.append(frame.select(*columns, file=pl.lit(number)).collect(engine="streaming"))
    return pl.concat(found)


def _dropped_by_corpus(run: Run, corpus: Manifest, key_or_url: str) -> Iterator[str]:
    """Yield lines about the rows of sources that are in no caption table."""
    is_key = _KEY.fullmatch(key_or_url) is not None
    hashed = pl.DataFrame({"url": [key_or_url]}).select(url_hash()).item()
    wanted = pl.col("key") == key_or_url if is_key else pl.col("url_hash") == hashed
    # An address that continues is another one.
    inside = re.compile(re.escape(key_or_url) + r"""(?=[\s,"'\\]|$)""")
    written = {shard.path for shard in corpus.shards if shard.num_samples}
    for task, facts in facts_of(corpus).items():
        source = ", ".join(facts.sources)
        if (path := drops_path(task)) in written:
            table = pl.scan_parquet(store.join(run.folder, "corpus", path))
            found = table.filter(wanted).collect().sort("reason", DETAIL, "key")
            for (reason, text), rows in found.group_by("reason", DETAIL, maintain_order=True):
                if reason == JOINED:
                    yield f"{source}: {rows.height} further captions of one image"
                    yield f"  dropped by corpus: {reason} (part of the text {text})"
                    continue
                for key in rows["key"]:
                    yield f"{key}  {source}"
                    yield f"  dropped by corpus: {reason}"
        if not is_key and (path := malformed_table(task)) in written:
            table = pl.scan_parquet(store.join(run.folder, "corpus", path))
            holds = pl.col("text").str.contains(key_or_url, literal=True)
            for reason, text in table.filter(holds).select("reason", "text").collect().iter_rows():
                if inside.search(text):
                    yield f"{source}  {text!r}"
                    yield f"  dropped by corpus: {reason}"


def _fate(run: Run, config: FilterTextConfig, row: dict[str, object]) -> Iterator[str]:
    drops = dict(_drops(run, str(row["key"]), str(row["url"] or "")))
    if found := drops.get("filter_text"):
        yield f"dropped by filter_text: {found[0]}{_detail(config, *found, row)}"
        return
    if "dedup" in drops and not _is_first(run, row):
        yield f"dropped by dedup: {drops['dedup'][0]} (a lower table and row has the same URL and caption)"
        return
    for stage in STEPS[2:]:  # what became of the image
        if found := drops.get(stage):
            yield f"dropped by {stage}: {found[0]}" + (f" ({found[1]})" if found[1] else "")
            return
    place = _shard_of(run, str(row["key"]))
    yield f"kept: {place}" if place else "kept so far; the shards are not made yet"


def _drops(run: Run, key: str, url: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Yield (stage, (reason, detail)) of the drop tables that hold a row."""
    hashed = pl.DataFrame({"url": [url]}).select(url_hash()).item()
    for stage in STEPS:
        for path in _outputs(run, stage, "dropped/"):
            # Drop tables are sorted by URL hash: row groups outside it are skipped unread.
            found = pl.scan_parquet(path).filter(url_hash=hashed, key=key).collect()
            if found.height:
                found_row = found.row(0, named=True)
                status = found_row.get(HTTP_STATUS)
                detail = found_row.get(DETAIL) or (str(status) if status else None)
                yield stage, (found_row["reason"], detail)
                break


def _is_first(run: Run, row: dict[str, object]) -> bool:
    for path in _outputs(run, "dedup", "kept/"):
        found = pl.scan_parquet(path).filter(key=row["key"]).select("file", "row").collect()
        if found.height:
            return found.row(0) == (row["file"], row["row"])
    return False


def _shard_of(run: Run, key: str) -> str | None:
    # Rows that [split] set aside for validation are packed like those for training.
    for path in (*_outputs(run, "shards", "", ".parquet"), *_outputs(run, "validation", "", ".parquet")):
        if pl.scan_parquet(path).filter(key=key).select(pl.len()).collect().item():
            return f"{path.removesuffix('.parquet')}.tar, member {key}.jpg"
    return None


def _outputs(run: Run, stage: str, prefix: str, suffix: str = ".parquet") -> list[str]:
    manifest: Manifest | None = read_manifest(run, stage)
    shards = manifest.shards if manifest else ()
    return [
        store.join(run.folder, stage, shard.path)
        for shard in shards
        if shard.path.startswith(prefix) and shard.path.endswith(suffix) and shard.num_samples
    ]


def _detail(config: FilterTextConfig, reason: str, detail: str | None, row: dict[str, object]) -> str:
    """Return the detail of a drop: the word from the drop table (lists are edited), the rest from the row."""
    caption = str(row["caption"] or "").strip()
    if detail is not None:
        return f" (the word {detail!r})"
    if reason == text_rules.SCORE_BELOW_THRESHOLD:
        return f" ({row['score']:.4f} < {config.min_score})"
    if reason in (text_rules.TOO_SHORT, text_rules.TOO_LONG):
        return f" ({len(caption)} characters; {config.min_characters} to {config.max_characters} stay)"
    if reason == text_rules.LANGUAGE:
        return f" ({row['language']})"
    return ""
