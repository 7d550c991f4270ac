"""The whole run on one page: every stage, in order. The only module that imports all the others.

A run's TOML has one table a stage, named as here. Functions that do the work are imported when a stage
runs, so that a plan prints at once.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator

from data_prep import corpus, dedup, download, filter_image, filter_text, shards
from data_prep.corpus import SourcesConfig, TablesConfig
from data_prep.dedup import DedupConfig
from data_prep.download import DownloadConfig
from data_prep.filter_image import FilterImageConfig
from data_prep.filter_text import FilterTextConfig
from data_prep.shards import ShardsConfig
from data_prep.sources.demo import DemoConfig
from data_prep.sources.emoji import EmojiConfig
from eval import stages as evaluation_stages
from eval.stages import IndexConfig
from pipeline import store
from pipeline.config import apply_overrides, build, find_recipe, read_toml, to_toml
from pipeline.evaluation_sets import EvaluationSource
from pipeline.records import ConfigError
from pipeline.runner import Run
from pipeline.stage import Stage
from training import stage as training_stage
from training import vocabulary
from training.config import TrainConfig, paper_recipe
from training.model.config import MODELS
from training.vocabulary import VocabularyConfig

# What each rank of a training stage runs.
RANK_MODULE = "pipeline.rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTable:
    """`[run]`: where the run lives and how its tasks are spread."""

    folder: str  # local path or fsspec URL; each stage has a folder in it
    seed: int = 0  # of the order of samples, augmentation, dropout and new weights
    executor: Literal["local", "ray"] = "local"  # who runs a stage's independent tasks
    processes: int = 2  # at once, where the executor is local


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTable:
    """`[model]`: which of the sizes in training/model/config.py, and what it starts from."""

    name: str
    vocabulary: str | None = None  # vocab.txt, folder or model id; unset: learned from the corpus
    image_weights: str | None = None  # an English CLIP for the image tower; unset: [english], else random
    text_weights: str | None = None  # a Chinese BERT for the text tower; unset: random


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run's TOML file."""

    run: RunTable
    corpus: Annotated[DemoConfig | EmojiConfig | TablesConfig | SourcesConfig, Discriminator("kind")]
    model: ModelTable
    evaluation: tuple[EvaluationSource, ...] = ()
    filter_text: FilterTextConfig = field(default_factory=FilterTextConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    filter_image: FilterImageConfig = field(default_factory=FilterImageConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    english: TrainConfig | None = None  # stands in for OpenAI's CLIP where its weights are not at hand
    stage1: TrainConfig | None = None  # image tower locked (paper, 2.3)
    stage2: TrainConfig | None = None  # everything trained (paper, 2.3)
    index: IndexConfig = field(default_factory=IndexConfig)


def load(path: str, overrides: Sequence[str] = ()) -> tuple[Run, RunConfig]:
    """Read, override and check a run's TOML (a path, or the name of a shipped recipe)."""
    path = find_recipe(path)
    table = apply_overrides(read_toml(path), overrides)
    config = build(RunConfig, _with_paper_recipes(table, path), path)
    if config.model.name not in MODELS:
        raise ConfigError(f"{path}: model.name: no model {config.model.name!r}; known: {', '.join(MODELS)}")
    if config.stage1 is None and config.stage2 is None:
        raise ConfigError(f"{path}: nothing to train; give [stage1], [stage2] or both")
    if isinstance(config.corpus, TablesConfig | SourcesConfig) and not config.evaluation:
        raise ConfigError(f"{path}: no [[evaluation]]; name at least one set with name and folder")
    for name in ("english", "stage1", "stage2"):
        if (train := getattr(config, name)) is not None:
            train.check(name)
    return make_run(config), config


def _with_paper_recipes(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Fill in stages that say `recipe = "paper"` from training/recipes/pretrain.toml; own values go first."""
    filled = dict(table)
    for stage in ("stage1", "stage2"):
        own = table.get(stage)
        if not isinstance(own, dict) or "recipe" not in own:
            continue
        if own["recipe"] != "paper":
            raise ConfigError(f'{where}: {stage}.recipe: found {own["recipe"]!r}; the only recipe is "paper"')
        paper = dataclasses.asdict(paper_recipe(table.get("model", {}).get("name", ""), stage))
        augment = {**paper["augment"], **own.get("augment", {})}
        filled[stage] = {**paper, **own, "augment": augment}
        del filled[stage]["recipe"]
    return filled


def write_resolved(run: Run, config: RunConfig) -> None:
    """Write the configuration with every default filled in beside the results."""
    store.write_text(store.join(run.folder, "run.resolved.toml"), to_toml(config))


def make_run(config: RunConfig) -> Run:
    """The stages of a run, in order."""
    train_stages = _training_stages(config)
    # Scored and shown: the stages that end in a Chinese model, in order; the last one is final.
    scored = tuple(stage.name for stage in train_stages if stage.name != "english")
    scores = evaluation_stages.ScoreConfig(
        stages=scored,
        vocabulary=config.model.vocabulary,
        context_length=max(train.context_length for train in (config.stage1, config.stage2) if train),
    )
    learned = () if config.model.vocabulary else ("vocabulary",)
    stages = [
        Stage(
            name="corpus",
            title="caption tables and evaluation sets, bound by digest",
            version=1,
            config=corpus.CorpusStageConfig(corpus=config.corpus, evaluations=config.evaluation),
            parents=(),
            tasks=corpus.tasks,
            run=corpus.run,
        ),
        Stage(
            name="filter_text",
            title="language, score, length, blacklist, addresses of evaluation pictures",
            version=1,
            config=config.filter_text,
            parents=("corpus",),
            tasks=filter_text.tasks,
            run=filter_text.run,
        ),
        Stage(
            name="dedup",
            title="exact duplicates out; rows shuffled, once",
            version=1,
            config=config.dedup,
            parents=("filter_text",),
            tasks=dedup.tasks,
            run=dedup.run,
        ),
        Stage(
            name="download",
            title="img2dataset fetches, turns upright and resizes",
            version=1,
            config=config.download,
            parents=("corpus", "dedup"),
            tasks=download.tasks,
            run_together=download.run_together,
            processes=config.download.processes,
        ),
        Stage(
            name="filter_image",
            title="size, aspect, copies of evaluation pictures",
            version=1,
            config=config.filter_image,
            parents=("corpus", "download"),
            tasks=filter_image.tasks,
            run=filter_image.run,
        ),
        Stage(
            name="shards",
            title="tar shards with a Parquet sidecar: what training reads",
            version=1,
            config=config.shards,
            parents=("download", "filter_image"),
            tasks=shards.tasks,
            run=shards.run,
        ),
    ]
    columns = _learned_columns(config, train_stages)
    if columns:
        stages.append(
            Stage(
                name="vocabulary",
                title="word pieces learned from the captions",
                version=1,
                config=dataclasses.replace(config.vocabulary, columns=columns),
                parents=("shards",),
                tasks=vocabulary.tasks,
                run=vocabulary.run,
            )
        )
    stages += train_stages
    stages += [
        Stage(
            name="embed",
            title="features of the evaluation sets, in clip-retrieval's layout",
            version=1,
            config=scores,
            parents=("corpus", *learned, *scored),
            tasks=evaluation_stages.embed_tasks,
            run=evaluation_stages.embed,
            parallel=False,  # a model in memory for each process is too much
        ),
        Stage(
            name="index",
            title="FAISS index of each set's pictures and texts",
            version=1,
            config=config.index,
            parents=("embed",),
            tasks=evaluation_stages.index_tasks,
            run=evaluation_stages.build_indices,
        ),
        Stage(
            name="retrieval",
            title="predictions and Recall@K in the official files",
            version=1,
            config=scores,
            parents=("corpus", "embed", "index"),
            tasks=evaluation_stages.retrieval_tasks,
            run=evaluation_stages.retrieve,
        ),
        Stage(
            name="baseline",
            title="pixel nearest neighbour and chance, to compare with",
            version=1,
            config=None,
            parents=("corpus", "shards"),
            tasks=evaluation_stages.baseline_tasks,
            run=evaluation_stages.baseline,
        ),
    ]
    stages.append(
        Stage(
            name="report",
            title="one HTML page and report.json",
            version=2,
            config=evaluation_stages.ReportConfig(
                score=scores,
                model=config.model.name,
                training_stages=tuple(stage.name for stage in train_stages),
                titles={stage.name: stage.title for stage in stages},
            ),
            parents=tuple(stage.name for stage in stages),
            tasks=evaluation_stages.report_tasks,
            run=evaluation_stages.report,
        )
    )
    table = config.run
    return Run(table.folder, table.seed, table.executor, table.processes, tuple(stages))


def _training_stages(config: RunConfig) -> list[Stage]:
    """english (where asked for) → stage1 → stage2: each hands its weights to the next (paper, 2.3)."""
    stages: list[Stage] = []
    before: str | None = None
    for name, title, train in (
        (
            "english",
            "image tower from English captions, as the paper starts from OpenAI's CLIP",
            config.english,
        ),
        ("stage1", "image tower locked, text tower trained", config.stage1),
        ("stage2", "both towers trained", config.stage2),
    ):
        if train is None:
            continue
        starts_new = before in (None, "english")
        job = training_stage.TrainStageConfig(
            train=train,
            model=config.model.name,
            vocabulary=config.model.vocabulary if name != "english" else None,
            start_stage=None if starts_new else before,
            image_stage="english" if before == "english" else None,
            image_weights=config.model.image_weights if before is None and name != "english" else None,
            text_weights=config.model.text_weights if starts_new and name != "english" else None,
            save_openai=name == "english",
            validate=name != "english",
        )
        learns = job.vocabulary is None
        parents = ("corpus", "shards", *(("vocabulary",) if learns else ()), *((before,) if before else ()))
        stages.append(
            Stage(
                name=name,
                title=title,
                version=1,
                config=job,
                parents=parents,
                tasks=training_stage.tasks,
                run=functools.partial(training_stage.run, entry=RANK_MODULE),
                parallel=False,
            )
        )
        before = name
    return stages


def _learned_columns(config: RunConfig, train_stages: Sequence[Stage]) -> tuple[str, ...]:
    """Caption columns that need a vocabulary of their own."""
    configs = [stage.config for stage in train_stages if stage.config.vocabulary is None]
    return tuple(sorted({job.train.caption_column for job in configs}))
