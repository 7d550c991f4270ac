"""Stage corpus: what goes in. Names the caption tables and evaluation sets and binds them by digest.

The demo and emoji corpora are made here; other sources stay where they are and are only looked at.
"""

import dataclasses
import glob
import os
import tempfile
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import polars as pl
from pydantic import Discriminator

from data_prep import decontamination as guard
from data_prep.accounting.drop_table import drops_path
from data_prep.corpora.demo import DemoConfig, make_demo
from data_prep.corpora.emoji import EmojiConfig, make_emoji
from data_prep.rules.text import SCORE_RULE
from data_prep.sources import packed, text_file
from data_prep.sources import regions as convert
from data_prep.sources import table as caption_table
from data_prep.sources.packed import PackedSource
from data_prep.sources.table import TableSource
from pipeline.core import store
from pipeline.core.evaluation_sets import EvaluationSource, digest_of
from pipeline.core.evaluation_sets import facts as evaluation_facts
from pipeline.core.records import ConfigError, InputError, Manifest, Shard
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesConfig:
    """`[corpus]` of your own: caption tables, and evaluation sets in Chinese-CLIP's layout."""

    kind: Literal["tables"]
    tables: tuple[TableSource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcesConfig:
    """`[corpus]` of several sources: the paper's are in recipes/paper_corpus.toml."""

    kind: Literal["sources"]
    sources: tuple[Annotated[TableSource | PackedSource, Discriminator("kind")], ...]
    guards: tuple[str, ...] = ()  # files that `cnclip guard` made: these pictures stay out of training


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusStageConfig:
    """What the corpus stage depends on: `[corpus]` and `[[evaluation]]`."""

    corpus: DemoConfig | EmojiConfig | TablesConfig | SourcesConfig
    evaluations: tuple[EvaluationSource, ...] = ()


def plan(config: CorpusStageConfig, context: Context) -> list[Task]:
    """One task a table; the demo and emoji corpora are one task."""
    sets = {f"evaluation {item.name}": digest_of(item) for item in config.evaluations}
    if isinstance(config.corpus, DemoConfig):
        return [Task("demo", sets)]
    if isinstance(config.corpus, EmojiConfig):
        if not os.path.isdir(config.corpus.folder):
            raise InputError(
                f"{config.corpus.folder}: no such folder; `make emoji` builds it, or name another one with"
                f" --set corpus.folder=DIR"
            )
        files = sorted(glob.glob(os.path.join(config.corpus.folder, "*.parquet")))
        return [
            Task("emoji", {**sets, **{os.path.basename(path): store.digest_file(path) for path in files}})
        ]
    if not sources_of(config.corpus):
        raise ConfigError(
            f"corpus.{config.corpus.kind}: empty; name at least one [[corpus.{config.corpus.kind}]]"
        )
    guards = {f"guard {path}": store.digest_file(path) for path in guards_of(config.corpus)}
    return [
        Task(
            name=f"{number:05d}",
            inputs={**sets, **guards, **_digests(files)},
            arguments={"paths": files, "source": dataclasses.asdict(source)},
        )
        for number, (source, files) in enumerate(_pieces(config.corpus))
    ]


def sources_of(config: TablesConfig | SourcesConfig) -> tuple[TableSource | PackedSource, ...]:
    return config.tables if isinstance(config, TablesConfig) else config.sources


def guards_of(config: TablesConfig | SourcesConfig) -> tuple[str, ...]:
    """Paths of the guards; InputError where one is not there."""
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
    """What one task looks at: a file alone, the files whose captions are joined, or a packed piece."""
    for source in sources_of(config):
        if isinstance(source, PackedSource):
            yield from ((source, files) for files in packed.pieces(source))
        elif source.joins:
            yield source, caption_table.find_files(source)
        else:
            yield from ((source, [path]) for path in caption_table.find_files(source))


def _digests(files: list[str]) -> dict[str, str]:
    if len(files) == 1:
        return {"table": store.digest_file(files[0])}
    return {f"table {path}": store.digest_file(path) for path in files}


def run(config: CorpusStageConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Make the demo or emoji corpus, or look at one table of your own."""
    if isinstance(config.corpus, TablesConfig | SourcesConfig):
        return _take_in(config, config.corpus, context, task)
    if store.is_local(context.run_folder):
        folder = Path(context.path())
        _make(config.corpus, folder)
        return _describe_made(config, folder)
    with tempfile.TemporaryDirectory(prefix="cnclip-corpus-") as place:
        _make(config.corpus, Path(place))
        store.put_folder(place, context.path())
        return _describe_made(config, Path(place))


def _make(corpus: DemoConfig | EmojiConfig, folder: Path) -> None:
    if isinstance(corpus, DemoConfig):
        make_demo(corpus, folder)
    else:
        make_emoji(corpus, folder)


def _describe_made(config: CorpusStageConfig, folder: Path) -> Outcome:
    """Account for the files of a made corpus, which lies in a local folder."""
    sources = {}
    outputs: dict[str, int] = {}
    carry = ("caption_en",)
    for path in sorted((folder / "tables").glob("*.parquet")):
        num_rows = pl.scan_parquet(path).select(pl.len()).collect().item()
        outputs[f"tables/{path.name}"] = num_rows
        source = TableSource(path=f"tables/{path.name}", name=path.stem, carry_columns=carry)
        sources[f"tables/{path.name}"] = caption_table.describe(source)
    evaluations = {}
    for path in sorted((folder / "evaluation").glob("*/*_imgs.tsv")):
        name = path.name.removesuffix("_imgs.tsv")
        evaluations[name] = f"evaluation/{path.parent.name}"
    total = sum(outputs.values())
    planned = [folder / "site.json", folder / "planted.json", folder / "planted.parquet"]
    for path in [*sorted((folder / "evaluation").rglob("*.*")), *planned]:
        if path.is_file():
            outputs[path.relative_to(folder).as_posix()] = 0
    return Outcome(
        outputs,
        num_in=total,
        num_kept=total,
        extra={"tables": sources, **evaluation_facts(evaluations, config.evaluations), "site": True},
    )


def _take_in(
    config: CorpusStageConfig, corpus: TablesConfig | SourcesConfig, context: Context, task: Task
) -> Outcome:
    """Look at one Parquet table where it lies, or write another source as a table of the run."""
    guards = guards_of(corpus)
    extra = {**evaluation_facts({}, config.evaluations), **({"guards": list(guards)} if guards else {})}
    paths, fields = task.arguments["paths"], task.arguments["source"]
    table_path, malformed_path = f"tables/{task.name}.parquet", malformed_table(task.name)
    to = convert.Places(
        context.path(table_path), context.path(malformed_path), context.path(drops_path(task.name))
    )
    if fields["kind"] in typing.get_args(packed.PackedKind):
        lists = {name: tuple(fields[name]) for name in ("exempt_from", "carry_columns")}
        source = PackedSource(**{**fields, **lists})
        extra["packed"] = {source.name: store.absolute(source.path)}
        taken = packed.unpack(source, paths, to)
    else:
        table = caption_table.from_description(fields)
        if table.joins:
            taken = convert.join_regions(paths, table, guard.guarded_ids(guards), to)
        elif text_file.is_text(paths[0]):
            taken = convert.convert_text(paths[0], table, to)
        else:
            return _look_at_table(paths[0], table, task.inputs["table"], extra)
    description = caption_table.describe(dataclasses.replace(taken.source, path=table_path))
    dropped = dict(taken.dropped)
    num_in = taken.num_rows + sum(dropped.values())
    if num_in == 0:
        _refuse_empty(paths[0], taken.source)
    counts = {"in": num_in, "kept": taken.num_rows, "dropped": dropped}
    pairs = caption_table.score_pairs(to.table, taken.source)
    extra |= {"tables": {table_path: description}, "sources": {taken.source.name: counts}}
    extra |= {"score_pairs": {taken.source.name: pairs}} if pairs else {}
    num_malformed = sum(dropped.values()) - taken.num_drops
    outputs = {table_path: taken.num_rows, malformed_path: num_malformed}
    if taken.num_drops:
        outputs[drops_path(task.name)] = taken.num_drops
    return Outcome(outputs, num_in=num_in, num_kept=taken.num_rows, dropped=dropped, extra=extra)


def _look_at_table(path: str, source: TableSource, digest: str, extra: dict[str, Any]) -> Outcome:
    with caption_table.naming_damage(path):
        num_rows = caption_table.scan(path, source).select(pl.len()).collect().item()
    if num_rows == 0:
        _refuse_empty(path, source)
    extra["external"] = {"path": path, "source": caption_table.describe(source), "digest": digest}
    extra["sources"] = {source.name: {"in": num_rows, "kept": num_rows, "dropped": {}}}
    if pairs := caption_table.score_pairs(path, source):
        extra["score_pairs"] = {source.name: pairs}
    return Outcome({}, num_in=num_rows, num_kept=num_rows, extra=extra)


def _refuse_empty(path: str, source: TableSource) -> NoReturn:
    raise InputError(f"{path}: no rows (source {source.name}); remove it from [corpus] or fill it")


def malformed_table(task: str) -> str:
    """Where a task keeps the rows that are none (reason, text: its beginning), in the stage's folder."""
    return f"malformed/{task}.parquet"


def tables_of(corpus: Manifest) -> list[dict[str, Any]]:
    """Tables of the corpus in order: {stage (None for an outside file), path, source, digest, num_rows}."""
    shards = {shard.path: shard for shard in corpus.shards}
    tables = []
    for extra in corpus.extra.values():
        for path, source in extra.get("tables", {}).items():
            facts = {"digest": shards[path].digest, "num_rows": shards[path].num_samples}
            tables.append({"stage": "corpus", "path": path, "source": source, **facts})
        if outside := extra.get("external"):
            num_rows = extra["sources"][outside["source"]["name"]]["in"]
            tables.append({"stage": None, **outside, "num_rows": num_rows})
    return tables


# Stages that judge downloaded pictures, in order; those after the first run only where a run asks for them.
ROW_STAGES = ("filter_image", "dedup_image", "filter_score")


def rows_stage(context: Context) -> str:
    """The parent whose kept rows a stage goes on with: the last of ROW_STAGES that it has."""
    return next(name for name in reversed(ROW_STAGES) if name in context.parents)


def kept_tables(context: Context, stage: str) -> list[Shard]:
    """Tables of the rows that a stage kept, in order, by their paths in its folder."""
    return [shard for shard in context.parents[stage].shards if shard.path.startswith("kept/")]


def table_name(shard: Shard) -> str:
    """`00000` of `kept/00000.parquet`."""
    return Path(shard.path).stem


def exemptions(corpus: Manifest) -> dict[str, tuple[str, ...]]:
    """Source → names of the rules that do not apply to it."""
    sources = [caption_table.from_description(table["source"]) for table in tables_of(corpus)]
    return {source.name: source.exemptions for source in sources}


def score_pairs(corpus: Manifest) -> dict[str, list[str]]:
    """Source → encoder pairs of its own scores, for sources that are judged by them."""
    exempt = {name for name, rules in exemptions(corpus).items() if SCORE_RULE in rules}
    found: dict[str, list[str]] = {}
    for extra in corpus.extra.values():
        for source, pairs in extra.get("score_pairs", {}).items():
            if source not in exempt:
                found[source] = sorted({*found.get(source, []), *pairs})
    return found


def evaluation_urls(context: Context) -> list[Shard]:
    """Files with the URLs of evaluation pictures, one a line; one for each set that has URLs."""
    return context.shards_of("corpus", "_urls.txt")


def site_folder(context: Context) -> str | None:
    """Folder that the download stage serves over loopback, where the corpus brings its own site."""
    made = any(extra.get("site") for extra in context.parents["corpus"].extra.values())
    return context.path_in("corpus") if made else None


def picture_folders(context: Context) -> dict[str, str]:
    """Source → folder of pictures on disk, which the download stage serves over loopback too."""
    sources = [table["source"] for table in tables_of(context.parents["corpus"])]
    return {source["name"]: source["picture_folder"] for source in sources if source["picture_folder"]}


def packed_folders(context: Context) -> dict[str, str]:
    """Source → folder of TSV, tar or LMDB files; the download stage serves the pictures in them."""
    found: dict[str, str] = {}
    for extra in context.parents["corpus"].extra.values():
        found |= extra.get("packed", {})
    return found


def guard_paths(corpus: Manifest) -> list[str]:
    """Guards of the run, whose pictures filter_image removes by their hashes."""
    return sorted({path for extra in corpus.extra.values() for path in extra.get("guards", ())})


def stage(config: CorpusStageConfig) -> Stage:
    """Return the stage that binds caption tables and evaluation sets by digest."""
    return Stage(
        "corpus",
        title="caption tables and evaluation sets, bound by digest",
        version=3,
        config=config,
        parents=(),
        plan=plan,
        run=run,
    )
