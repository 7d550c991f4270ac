"""Stage corpus: names the caption tables and evaluation sets and binds them by digest.

This stage generates the demo, emoji and pictures corpora; other sources stay in place and are only read.
"""

import dataclasses
import glob
import os
import tempfile
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

import polars as pl
from pydantic import Discriminator

from data_prep import decontamination
from data_prep.accounting.drop_table import drops_path
from data_prep.accounting.judged import SourceCounts
from data_prep.corpora.demo import DemoConfig, make_demo
from data_prep.corpora.emoji import EmojiConfig, make_emoji
from data_prep.corpora.pictures.corpus import PicturesConfig, make_pictures
from data_prep.corpus_facts import (
    CorpusFacts,
    OutsideTable,
    exemptions_of_shards,
    malformed_table,
    unpacked_images,
)
from data_prep.sources import packed, regions, text_file
from data_prep.sources import table as caption_table
from data_prep.sources.readers.places import served_folder
from data_prep.sources.readers.source import PackedKind, PackedSource
from data_prep.sources.table import TableSource
from pipeline.core import store
from pipeline.core.config import NOT_IN_DIGEST
from pipeline.core.evaluation_sets import EvaluationFacts, EvaluationSource, check_size, digest_of
from pipeline.core.facts import Facts
from pipeline.core.files.known_digests import digests_of_files
from pipeline.core.records import ConfigError, InputError
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

_SHOWN_NAMES = 3  # of sources and of evaluation sets, in the stage's title


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesConfig:
    """`[corpus]` of your own: caption tables, with evaluation sets in Chinese-CLIP's layout."""

    kind: Literal["tables"]
    """Chooses this corpus."""
    tables: tuple[TableSource, ...]
    """Caption tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcesConfig:
    """`[corpus]` of several sources; recipes/paper_corpus.toml has the paper's."""

    kind: Literal["sources"]
    """Chooses this corpus."""
    sources: tuple[Annotated[TableSource | PackedSource, Discriminator("kind")], ...]
    """Sources, each of its own kind."""
    guards: tuple[str, ...] = ()
    """Files made by `cnclip guard`: the images they list stay out of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusStageConfig:
    """The settings of the corpus stage: `[corpus]` and `[[evaluation]]`."""

    corpus: DemoConfig | EmojiConfig | PicturesConfig | TablesConfig | SourcesConfig
    evaluations: tuple[EvaluationSource, ...] = ()
    are_scored: bool = field(default=False, metadata=NOT_IN_DIGEST)  # and not only excluded from training


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusTask(Facts):
    """The input of one task: a single file, files whose captions are joined, or a packed piece."""

    paths: list[str]
    source: TableSource | PackedSource
    # For shards: source → rules that do not apply to its rows.
    exemptions: Mapping[str, Sequence[str]] | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        source = fields["source"]
        if source["kind"] not in typing.get_args(PackedKind):
            return cls(paths=fields["paths"], source=caption_table.from_description(source))
        lists = {name: tuple(source[name]) for name in ("exempt_from", "carry_columns")}
        return cls(
            paths=fields["paths"],
            source=PackedSource(**{**source, **lists}),
            exemptions=fields.get("exemptions"),
        )


def refuse_misplaced_kinds(corpus: Any, where: str) -> None:
    """Refuse a source that brings its images in a place for tables: its settings are unknown there.

    Raises:
        ConfigError: names `where` (the file), the key, the kind, and where it belongs.
    """
    tables = corpus.get("tables") if isinstance(corpus, Mapping) else None
    entries = {"corpus": corpus} | {
        f"corpus.tables.{number}": entry
        for number, entry in enumerate(tables if isinstance(tables, list) else [])
    }
    for place, entry in entries.items():
        kind = entry.get("kind") if isinstance(entry, Mapping) else None
        if kind in typing.get_args(PackedKind):
            raise ConfigError(
                f"{where}: {place}.kind: {kind!r} is a kind of [[corpus.sources]], which bring their images;"
                f' write [corpus] kind = "sources" and [[corpus.sources]] kind = "{kind}" with its settings'
            )


def plan(config: CorpusStageConfig, context: Context) -> list[Task]:
    """Plan one task for each table; a corpus that the project makes is one task."""
    for item in config.evaluations if config.are_scored else ():
        check_size(item)
    sets = {f"evaluation {item.name}": digest_of(item) for item in config.evaluations}
    if isinstance(config.corpus, DemoConfig):
        return [Task("demo", sets)]
    if isinstance(config.corpus, EmojiConfig | PicturesConfig):
        kind = config.corpus.kind
        if not os.path.isdir(config.corpus.folder):
            raise InputError(
                f"{config.corpus.folder}: no such folder; `make {kind}` builds it, or name another one with"
                f" --set corpus.folder=DIR"
            )
        files = sorted(glob.glob(os.path.join(config.corpus.folder, "*.parquet")))
        return [Task(kind, {**sets, **{os.path.basename(path): store.digest_file(path) for path in files}})]
    if not sources_of(config.corpus):
        raise ConfigError(
            f"corpus.{config.corpus.kind}: empty; name at least one [[corpus.{config.corpus.kind}]]"
        )
    _refuse_shared_names(config.corpus)
    _refuse_carried_rules(config.corpus)
    if not store.exists(context.path("manifest.json")):  # finished work outlives its images
        check(config, context)
    exempt = {
        source.name: exemptions_of_shards(source.path)
        for source in sources_of(config.corpus)
        if isinstance(source, PackedSource) and source.kind == "shards"
    }
    guards = {f"guard {path}": store.digest_file(path) for path in guards_of(config.corpus)}
    pieces = list(_pieces(config.corpus))
    return [
        Task(
            name=f"{number:05d}",
            inputs={**sets, **guards, **files_read, **_reading(source, files)},
            arguments=CorpusTask(
                paths=files, source=source, exemptions=exempt.get(source.name) or None
            ).to_json(),
        )
        for number, ((source, files), files_read) in enumerate(zip(pieces, _digests(pieces), strict=True))
    ]


def check(config: CorpusStageConfig, context: Context) -> None:
    """Refuse a local image folder that does not exist, which only the download would find.

    Raises:
        InputError: names the folder and its source.
    """
    if not isinstance(config.corpus, TablesConfig | SourcesConfig):
        return
    for source in sources_of(config.corpus):
        folder = source.picture_folder if isinstance(source, TableSource) else None
        if folder is not None and store.is_local(folder) and not os.path.isdir(folder):
            raise InputError(
                f"{folder}: no such folder (picture_folder of source {source.name}); correct it in"
                f" [[corpus.{config.corpus.kind}]], or put the images there"
            )


def _refuse_shared_names(corpus: TablesConfig | SourcesConfig) -> None:
    """Refuse two sources with one name if one has images, which rows of the other could request."""
    folders: dict[str, str | None] = {}
    for source in sources_of(corpus):
        folder = source.path if isinstance(source, PackedSource) else source.picture_folder
        if folders.setdefault(source.name, folder) != folder:
            raise ConfigError(
                f"corpus.{corpus.kind}: two sources named {source.name!r} have different image folders"
                f" ({folders[source.name]}, {folder}); give each a different name"
            )


def _refuse_carried_rules(corpus: TablesConfig | SourcesConfig) -> None:
    """Refuse a carried column with the name under which rows of shards keep their exemptions."""
    for source in sources_of(corpus):
        if isinstance(source, TableSource) and caption_table.EXEMPT_COLUMN in source.carry_columns:
            raise ConfigError(
                f"corpus.{corpus.kind} {source.name}: carry_columns names {caption_table.EXEMPT_COLUMN!r},"
                " the column in which a run keeps the rules that do not apply to a row; rename the column"
            )


def _reading(source: TableSource | PackedSource, files: Sequence[str]) -> dict[str, str]:
    """Return how a source is read if the meaning of its description has changed."""
    if isinstance(source, PackedSource):
        return {"captions": "UTF-8, or malformed"} if source.kind == "webdataset" else {}
    found = {"captions": "rows of their own"} if source.has_image_ids and not source.joins else {}
    if any(text_file.is_text(path) for path in files):
        found["text"] = "no quote swallows rows"
    return found


def sources_of(config: TablesConfig | SourcesConfig) -> tuple[TableSource | PackedSource, ...]:
    return config.tables if isinstance(config, TablesConfig) else config.sources


def guards_of(config: TablesConfig | SourcesConfig) -> tuple[str, ...]:
    """Return the paths of the guards.

    Raises:
        InputError: if one is missing.
    """
    guards = config.guards if isinstance(config, SourcesConfig) else ()
    for path in guards:
        if not store.exists(path):
            raise InputError(
                f"{path}: no such file; make it with cnclip guard, or take it out of corpus.guards"
            )
    return guards


def _pieces(
    config: TablesConfig | SourcesConfig,
) -> Iterator[tuple[TableSource | PackedSource, list[str]]]:
    """Yield the input of each task: a file, files whose captions are joined, or a packed piece."""
    for source in sources_of(config):
        if isinstance(source, PackedSource):
            yield from ((source, files) for files in packed.pieces(source))
        elif source.joins:
            yield source, caption_table.find_files(source)
        else:
            yield from ((source, [path]) for path in caption_table.find_files(source))


def sources(config: CorpusStageConfig) -> list[str]:
    """Return the caption tables that tasks are bound to by their bytes."""
    if not isinstance(config.corpus, TablesConfig | SourcesConfig):
        return []  # a corpus that the project makes
    return [
        path for source, files in _pieces(config.corpus) if isinstance(source, TableSource) for path in files
    ]


def _digests(pieces: Sequence[tuple[TableSource | PackedSource, list[str]]]) -> list[dict[str, str]]:
    """Return the inputs of each piece: the digests of its files, or what its kind of source has instead."""
    own = [packed.digests(item, files) if isinstance(item, PackedSource) else None for item, files in pieces]
    paths = [path for (_, files), found in zip(pieces, own, strict=True) if found is None for path in files]
    known = dict(zip(paths, digests_of_files(paths), strict=True))
    return [
        found if found is not None else _inputs(files, known)
        for (_, files), found in zip(pieces, own, strict=True)
    ]


def _inputs(files: list[str], digests: Mapping[str, str]) -> dict[str, str]:
    if len(files) == 1:
        return {"table": digests[files[0]]}
    return {f"table {path}": digests[path] for path in files}


def run(config: CorpusStageConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Generate a corpus that the project makes, or read one table."""
    if isinstance(config.corpus, TablesConfig | SourcesConfig):
        return _take_in(config, config.corpus, context, task)
    if store.is_local(context.run_folder):
        folder = Path(context.path())
        _make(config.corpus, folder)
        # An object store itself protects the site's thousands of files.
        site = sorted(
            path.relative_to(folder).as_posix() for path in (folder / "site").rglob("*") if path.is_file()
        )
        return dataclasses.replace(_describe_made(config, folder), also=site)
    with tempfile.TemporaryDirectory(prefix="cnclip-corpus-") as place:
        _make(config.corpus, Path(place))
        store.put_folder(place, context.path())
        return _describe_made(config, Path(place))


def _make(corpus: DemoConfig | EmojiConfig | PicturesConfig, folder: Path) -> None:
    if isinstance(corpus, DemoConfig):
        make_demo(corpus, folder)
    elif isinstance(corpus, PicturesConfig):
        make_pictures(corpus, folder)
    else:
        make_emoji(corpus, folder)


def _describe_made(config: CorpusStageConfig, folder: Path) -> Outcome:
    """Account for the files of a generated corpus in a local folder."""
    tables: dict[str, TableSource] = {}
    outputs: dict[str, int] = {}
    for path in sorted((folder / "tables").glob("*.parquet")):
        place = f"tables/{path.name}"
        outputs[place] = pl.scan_parquet(path).select(pl.len()).collect().item()
        tables[place] = TableSource(path=place, name=path.stem, carry_columns=("caption_en",))
    evaluations = {}
    for path in sorted((folder / "evaluation").glob("*/*_imgs.tsv")):
        name = path.name.removesuffix("_imgs.tsv")
        evaluations[name] = f"evaluation/{path.parent.name}"
    total = sum(outputs.values())
    planned = [folder / "site.json", folder / "planted.json", folder / "planted.parquet"]
    for path in [*sorted((folder / "evaluation").rglob("*.*")), *planned]:
        if path.is_file():
            outputs[path.relative_to(folder).as_posix()] = 0
    facts = CorpusFacts(
        tables=tables, site=True, evaluations=EvaluationFacts.of(evaluations, config.evaluations)
    )
    return Outcome(outputs, num_in=total, num_kept=total, extra=facts.to_json())


def _take_in(
    config: CorpusStageConfig, corpus: TablesConfig | SourcesConfig, context: Context, task: Task
) -> Outcome:
    """Read one Parquet table in place, or write another source as a table of the run."""
    guards = guards_of(corpus)
    facts = CorpusFacts(guards=guards, evaluations=EvaluationFacts.of({}, config.evaluations))
    asked = CorpusTask.from_json(task.arguments)
    paths, source = asked.paths, asked.source
    if _is_empty_part(paths, source):
        return _nothing(source, facts)
    table_path, malformed_path = f"tables/{task.name}.parquet", malformed_table(task.name)
    to = regions.Places(
        context.path(table_path),
        context.path(malformed_path),
        context.path(drops_path(task.name)),
        context.path(unpacked_images(task.name)),
    )
    if isinstance(source, PackedSource):
        facts = dataclasses.replace(facts, packed={source.name: served_folder(source.path)})
        taken = packed.unpack(source, paths, to, asked.exemptions or {})
    elif source.joins:
        taken = regions.join_regions(paths, source, decontamination.guarded_ids(guards), to)
    elif source.has_image_ids:
        taken = regions.take_captions(paths[0], source, decontamination.guarded_ids(guards), to)
    elif text_file.is_text(paths[0]):
        taken = regions.convert_text(paths[0], source, to)
    elif caption_table.is_damaged_text(paths[0], source):
        taken = regions.convert_damaged(paths[0], source, to)
    else:
        return _look_at_table(paths[0], source, task.inputs["table"], facts)
    dropped = dict(taken.dropped)
    num_in = taken.num_rows + sum(dropped.values())
    if num_in == 0 and not _is_part(source):
        _refuse_empty(paths[0], taken.source)
    name = taken.source.name
    pairs = caption_table.encoder_pairs(to.table, taken.source)
    facts = dataclasses.replace(
        facts,
        tables={table_path: dataclasses.replace(taken.source, path=table_path)},
        sources={name: SourceCounts(num_in=num_in, num_kept=taken.num_rows, dropped=dropped)},
        score_pairs={name: pairs} if pairs else {},
        unpacked=(name,) if taken.num_copies else (),
    )
    num_malformed = sum(dropped.values()) - taken.num_drops
    outputs = {table_path: taken.num_rows, malformed_path: num_malformed}
    if taken.num_drops:
        outputs[drops_path(task.name)] = taken.num_drops
    if taken.num_copies:
        outputs[unpacked_images(task.name)] = taken.num_copies
    return Outcome(outputs, num_in=num_in, num_kept=taken.num_rows, dropped=dropped, extra=facts.to_json())


def _look_at_table(path: str, source: TableSource, digest: str, facts: CorpusFacts) -> Outcome:
    with caption_table.naming_damage(path):
        num_rows = caption_table.scan(path, source, is_whole=True).select(pl.len()).collect().item()
    if num_rows == 0:
        if _is_part(source):
            return _nothing(source, facts)
        _refuse_empty(path, source)
    pairs = caption_table.encoder_pairs(path, source)
    facts = dataclasses.replace(
        facts,
        external=OutsideTable(path=path, source=source, digest=digest),
        sources={source.name: SourceCounts(num_in=num_rows, num_kept=num_rows)},
        score_pairs={source.name: pairs} if pairs else {},
    )
    return Outcome({}, num_in=num_rows, num_kept=num_rows, extra=facts.to_json())


def _is_part(source: TableSource | PackedSource) -> bool:
    """Return whether a source has several files, of which some may be empty."""
    if isinstance(source, PackedSource):
        return len(packed.pieces(source)) > 1
    return len(caption_table.find_files(source)) > 1


def _is_empty_part(paths: Sequence[str], source: TableSource | PackedSource) -> bool:
    return (
        isinstance(source, TableSource)
        and len(paths) == 1
        and text_file.is_text(paths[0])
        and store.num_bytes(paths[0]) == 0
        and _is_part(source)
    )


def _nothing(source: TableSource | PackedSource, facts: CorpusFacts) -> Outcome:
    """Account for a file without rows."""
    facts = dataclasses.replace(facts, sources={source.name: SourceCounts()})
    return Outcome({}, num_in=0, num_kept=0, extra=facts.to_json())


def _refuse_empty(path: str, source: TableSource) -> NoReturn:
    raise InputError(f"{path}: no rows (source {source.name}); remove it from [corpus] or fill it")


def _without_task(config: CorpusStageConfig) -> str:
    """Return what to do about a source's file that nothing repairs; its rows cannot be counted as dropped."""
    if not isinstance(config.corpus, TablesConfig | SourcesConfig):
        return ""
    return (
        "a corpus cannot continue without a file of its sources, not even with --without-failed; to leave it"
        f" out, move it away from the path in [[corpus.{config.corpus.kind}]], or remove its entry"
    )


def title_of(config: CorpusStageConfig) -> str:
    """Return in one line what the corpus is made from."""
    if isinstance(config.corpus, DemoConfig | EmojiConfig | PicturesConfig):
        return "caption tables and evaluation sets, bound by digest"
    shown = [
        f"{source.name} ({'' if isinstance(source, TableSource) else source.kind + ' '}{source.path})"
        for source in sources_of(config.corpus)
    ]
    sets = [item.name for item in config.evaluations]
    parts = [f"reads {_some(shown)}", *([f"evaluation sets {_some(sets)}"] if sets else [])]
    return "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def stage(config: CorpusStageConfig) -> Stage:
    """Return the stage that binds caption tables and evaluation sets by digest."""
    return Stage(
        "corpus",
        title=title_of(config),
        version=3,
        config=config,
        parents=(),
        plan=plan,
        run=run,
        sources=sources,
        check=check,
        without_task=_without_task(config),
    )
