"""Stage corpus: what goes in. Names the caption tables and evaluation sets and binds them by digest.

The demo and emoji corpora are made here; other sources stay where they are and are only looked at.
"""

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from data_prep.sources import table as caption_table
from data_prep.sources.demo import DemoConfig, make_demo
from data_prep.sources.emoji import EmojiConfig, make_emoji
from data_prep.sources.table import TableSource
from pipeline import store
from pipeline.evaluation_sets import EvaluationSource, digest_of
from pipeline.evaluation_sets import facts as evaluation_facts
from pipeline.records import ConfigError, InputError, Manifest, Shard
from pipeline.stage import Context, Outcome, Progress, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesConfig:
    """`[corpus]` of your own: caption tables, and evaluation sets in Chinese-CLIP's layout."""

    kind: Literal["tables"]
    tables: tuple[TableSource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusStageConfig:
    """What the corpus stage depends on: `[corpus]` and `[[evaluation]]`."""

    corpus: DemoConfig | EmojiConfig | TablesConfig
    evaluations: tuple[EvaluationSource, ...] = ()


def tasks(config: CorpusStageConfig, context: Context) -> list[Task]:
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
    if not config.corpus.tables:
        raise ConfigError("corpus.tables: empty; name at least one [[corpus.tables]] with path and name")
    return [
        Task(
            name=f"{number:05d}",
            inputs={**sets, "table": store.digest_file(path)},
            arguments={"path": path, "source": caption_table.describe(source)},
        )
        for number, (source, path) in enumerate(
            (source, path) for source in config.corpus.tables for path in caption_table.find_files(source)
        )
    ]


def run(config: CorpusStageConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Make the demo or emoji corpus, or look at one table of your own."""
    if isinstance(config.corpus, TablesConfig):
        return _look_at_table(config, task)
    folder = Path(context.path())
    if isinstance(config.corpus, DemoConfig):
        make_demo(config.corpus, folder)
    else:
        make_emoji(config.corpus, folder)
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


def _look_at_table(config: CorpusStageConfig, task: Task) -> Outcome:
    source = caption_table.from_description(task.arguments["source"])
    path = task.arguments["path"]
    with caption_table.naming_damage(path):
        num_rows = caption_table.scan(path, source).select(pl.len()).collect().item()
    if num_rows == 0:
        raise InputError(
            f"{path}: no rows (source {source.name}); remove it from [[corpus.tables]] or fill it"
        )
    return Outcome(
        {},
        num_in=num_rows,
        num_kept=num_rows,
        extra={
            "external": {"path": path, "source": task.arguments["source"], "digest": task.inputs["table"]},
            **evaluation_facts({}, config.evaluations),
        },
    )


def tables_of(corpus: Manifest) -> list[dict[str, Any]]:
    """Tables of the corpus in order: {stage (None for an outside file), path, source, digest}."""
    digests = {shard.path: shard.digest for shard in corpus.shards}
    tables = []
    for extra in corpus.extra.values():
        for path, source in extra.get("tables", {}).items():
            tables.append({"stage": "corpus", "path": path, "source": source, "digest": digests[path]})
        if outside := extra.get("external"):
            tables.append({"stage": None, **outside})
    return tables


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
