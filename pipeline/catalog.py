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

from data_prep import corpus
from data_prep.corpora.demo import DemoConfig
from data_prep.corpora.emoji import EmojiConfig
from data_prep.corpus import SourcesConfig, TablesConfig
from data_prep.dedup import exact as dedup
from data_prep.dedup import near_duplicates as dedup_image
from data_prep.dedup.exact import DedupConfig
from data_prep.dedup.near_duplicates import DedupImageConfig
from data_prep.download import stage as download
from data_prep.download.stage import DownloadConfig
from data_prep.filters import image as filter_image
from data_prep.filters import score
from data_prep.filters import text as filter_text
from data_prep.filters.image import FilterImageConfig
from data_prep.filters.score import FilterScoreConfig, ScoreConfig
from data_prep.filters.text import FilterTextConfig
from data_prep.shards import lock, split
from data_prep.shards import stage as shards
from data_prep.shards.lock import LockConfig
from data_prep.shards.split import SplitConfig
from data_prep.shards.stage import ShardsConfig
from eval import stages as evaluation_stages
from eval.report import stage as report_stage
from eval.stages import IndexConfig
from eval.zeroshot import stage as zeroshot_stage
from eval.zeroshot.stage import ClassificationSource, ZeroshotConfig
from pipeline import pair_scorers as pair_encoder
from pipeline.core import store
from pipeline.core.config import build, find_recipe, read_run, refuse_non_finite, to_toml
from pipeline.core.evaluation_sets import EvaluationSource
from pipeline.core.records import ConfigError
from pipeline.core.stage import Stage
from pipeline.launch.config import LaunchConfig
from pipeline.runner import Run
from training import stages as training_stage
from training import vocabulary
from training.checkpoint.selection import check_sets
from training.config.train import TrainConfig, check_fits, finetune_recipe, paper_recipe
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
    start_weights: str | None = (
        None  # a whole Chinese CLIP, of another resolution too; then none of the above
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run's TOML file."""

    run: RunTable
    corpus: Annotated[DemoConfig | EmojiConfig | TablesConfig | SourcesConfig, Discriminator("kind")]
    model: ModelTable
    evaluation: tuple[EvaluationSource, ...] = ()
    classification: tuple[ClassificationSource, ...] = ()
    filter_text: FilterTextConfig = field(default_factory=FilterTextConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    filter_image: FilterImageConfig = field(default_factory=FilterImageConfig)
    dedup_image: DedupImageConfig | None = None  # unset: copies of pictures stay, as in the paper
    score: ScoreConfig | None = None  # unset: rows whose source has no score are not judged by one
    filter_score: FilterScoreConfig | None = None  # unset: the paper's threshold on what [score] gives
    split: SplitConfig | None = None  # rows set aside for validation; unset: none
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    english: TrainConfig | None = None  # stands in for OpenAI's CLIP where its weights are not at hand
    stage1: TrainConfig | None = None  # image tower locked (paper, 2.3)
    stage2: TrainConfig | None = None  # everything trained (paper, 2.3)
    finetune: TrainConfig | None = None  # on the pairs of a downstream task (paper, A.3)
    index: IndexConfig = field(default_factory=IndexConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    zeroshot: ZeroshotConfig = field(default_factory=ZeroshotConfig)


def load(path: str, overrides: Sequence[str] = ()) -> tuple[Run, RunConfig]:
    """Read, override and check a run's TOML (a path, or the name of a shipped recipe)."""
    path = find_recipe(path)
    table = read_run(path, overrides)
    refuse_non_finite(table, path)
    config = build(RunConfig, _with_paper_recipes(table, path), path)
    if config.model.name not in MODELS:
        raise ConfigError(f"{path}: model.name: no model {config.model.name!r}; known: {', '.join(MODELS)}")
    if config.run.seed < 0:
        raise ConfigError(f"{path}: run.seed = {config.run.seed}: must not be negative")
    if config.stage1 is None and config.stage2 is None and config.finetune is None:
        raise ConfigError(f"{path}: nothing to train; give [stage1], [stage2] or both, or [finetune]")
    if config.filter_score is not None and config.score is None:
        raise ConfigError(
            f"{path}: filter_score: nothing to judge without [score]; give it, or filter_text.min_score"
        )
    model = config.model
    if model.start_weights and (model.image_weights or model.text_weights or config.english):
        raise ConfigError(
            f"{path}: model.start_weights is a whole model: leave out image_weights, text_weights, [english]"
        )
    if model.image_weights and config.english:
        raise ConfigError(
            f"{path}: model.image_weights and [english] both give the image tower: leave one of them out"
            ' (without = ["english"] in a run with a base)'
        )
    if isinstance(config.corpus, TablesConfig | SourcesConfig) and not config.evaluation:
        raise ConfigError(f"{path}: no [[evaluation]]; name at least one set with name and folder")
    for name in ("english", "stage1", "stage2", "finetune"):
        if (train := getattr(config, name)) is not None:
            train.check(name)
            check_fits(train, MODELS[model.name], name)
            if isinstance(config.corpus, TablesConfig | SourcesConfig):  # the made ones bring their own sets
                sets = [item.name for item in config.evaluation] if name != "english" else []
                check_sets(train, sets, name)
    return make_run(config), config


def _with_paper_recipes(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Fill in stages that say `recipe = …` from training/recipes; own values go first."""
    filled = dict(table)
    model = table.get("model", {}).get("name", "")
    names: tuple[Literal["stage1", "stage2", "finetune"], ...] = ("stage1", "stage2", "finetune")
    for stage in names:
        own = table.get(stage)
        if not isinstance(own, dict) or "recipe" not in own:
            continue
        if stage == "finetune":
            paper = dataclasses.asdict(finetune_recipe(model, own["recipe"]))
        elif own["recipe"] == "paper":
            paper = dataclasses.asdict(paper_recipe(model, stage))
        else:
            raise ConfigError(f'{where}: {stage}.recipe: found {own["recipe"]!r}; the only recipe is "paper"')
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
    scores = evaluation_stages.EvaluationConfig(
        stages=scored,
        vocabulary=config.model.vocabulary,
        context_length=max(
            train.context_length for train in (config.stage1, config.stage2, config.finetune) if train
        ),
    )
    learned = () if config.model.vocabulary else ("vocabulary",)
    stages = [
        Stage(
            name="corpus",
            title="caption tables and evaluation sets, bound by digest",
            version=3,
            config=corpus.CorpusStageConfig(corpus=config.corpus, evaluations=config.evaluation),
            parents=(),
            plan=corpus.tasks,
            run=corpus.run,
        ),
        Stage(
            name="filter_text",
            title="language, score, length, blacklist, addresses of evaluation pictures",
            version=3,
            config=config.filter_text,
            parents=("corpus",),
            plan=filter_text.tasks,
            run=filter_text.run,
        ),
        Stage(
            name="dedup",
            title="exact duplicates out; rows shuffled, once",
            version=1,
            config=config.dedup,
            parents=("filter_text",),
            plan=dedup.tasks,
            run=dedup.run,
        ),
        Stage(
            name="download",
            title="img2dataset fetches, turns upright and resizes",
            version=2,
            config=config.download,
            parents=("corpus", "dedup"),
            plan=download.tasks,
            run_together=download.run_together,
            processes=config.download.processes,
        ),
        Stage(
            name="filter_image",
            title="size, aspect, copies of evaluation pictures",
            version=1,
            config=config.filter_image,
            parents=("corpus", "download"),
            plan=filter_image.tasks,
            run=filter_image.run,
        ),
        *_row_stages(config),
    ]
    stages += _shard_stages(config, rows=stages[-1].name)
    stages.append(
        Stage(
            name="lock",
            title="sources, rules, settings and funnel of the corpus in one file",
            version=1,
            config=LockConfig(settings={stage.name: stage.config for stage in stages}),
            parents=tuple(stage.name for stage in stages),
            plan=lock.tasks,
            run=lock.run,
        )
    )
    columns = _learned_columns(config, train_stages)
    if columns:
        stages.append(
            Stage(
                name="vocabulary",
                title="word pieces learned from the captions",
                version=1,
                config=dataclasses.replace(config.vocabulary, columns=columns),
                parents=("shards",),
                plan=vocabulary.tasks,
                run=vocabulary.run,
            )
        )
    stages += train_stages
    stages += [
        evaluation_stages.embed_stage(scores, learned=learned),
        evaluation_stages.index_stage(config.index),
        evaluation_stages.retrieval_stage(scores),
        evaluation_stages.baseline_stage(),
    ]
    if config.classification:
        sets = zeroshot_stage.ZeroshotStageConfig(
            zeroshot=config.zeroshot,
            sets=config.classification,
            stage=scored[-1],
            vocabulary=config.model.vocabulary,
            context_length=scores.context_length,
        )
        stages.append(zeroshot_stage.stage(sets, learned=learned))
    shown = report_stage.ReportConfig(
        score=scores,
        model=config.model.name,
        training_stages=tuple(stage.name for stage in train_stages),
        titles={stage.name: stage.title for stage in stages},
    )
    stages.append(report_stage.stage(shown, parents=tuple(stage.name for stage in stages)))
    table = config.run
    return Run(table.folder, table.seed, table.executor, table.processes, tuple(stages))


def _row_stages(config: RunConfig) -> list[Stage]:
    """What a run asks for between the downloaded pictures and the shards."""
    stages: list[Stage] = []
    before = "filter_image"
    if config.dedup_image is not None:
        stages += [
            Stage(
                name="find_copies",
                title="pictures that are there already, exactly or nearly",
                version=1,
                config=config.dedup_image,
                parents=("corpus", before),
                plan=dedup_image.find_tasks,
                run=dedup_image.find_run,
            ),
            Stage(
                name="dedup_image",
                title="copies go, the lowest key of each picture stays",
                version=1,
                config=config.dedup_image,
                parents=("corpus", before, "find_copies"),
                plan=dedup_image.tasks,
                run=dedup_image.run,
            ),
        ]
        before = "dedup_image"
    if config.score is not None:
        stages += [
            Stage(
                name="score",
                title="cosine of picture and caption by two encoders",
                version=2,
                config=config.score,
                parents=("corpus", "download", before),
                plan=functools.partial(score.tasks, identify=pair_encoder.identify),
                run=functools.partial(score.run, load=pair_encoder.load),
                # On one machine a second process would hold a second copy of both encoders.
                parallel=config.run.executor == "ray",
            ),
            Stage(
                name="filter_score",
                title="pictures that their captions do not describe go",
                version=1,
                config=config.filter_score or FilterScoreConfig(),
                parents=("corpus", before, "score"),
                plan=score.filter_tasks,
                run=score.filter_run,
            ),
        ]
    return stages


def _shard_stages(config: RunConfig, rows: str) -> list[Stage]:
    """Shards of what the stage `rows` kept; with [split], the rows for validation in a stage of their own."""
    packing = Stage(
        name="shards",
        title="tar shards with a Parquet sidecar: what training reads",
        version=1,
        config=config.shards,
        parents=("download", rows),
        plan=shards.tasks,
        run=shards.run,
    )
    if config.split is None:
        return [packing]
    parents = ("download", rows, "split")
    return [
        Stage(
            name="split",
            title="pictures set aside for validation, with all their copies",
            version=1,
            config=config.split,
            parents=(rows,),
            plan=split.tasks,
            run=split.run,
        ),
        dataclasses.replace(packing, parents=parents),
        dataclasses.replace(
            packing,
            name="validation",
            title="tar shards of the rows set aside: training never reads them",
            parents=parents,
            plan=functools.partial(shards.tasks, part="validation"),
        ),
    ]


def _training_stages(config: RunConfig) -> list[Stage]:
    """english (where asked for) → stage1 → stage2 → finetune: each hands its weights to the next (2.3)."""
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
        ("finetune", "both towers trained on a task's own pairs", config.finetune),
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
            image_weights=config.model.image_weights if before is None else None,
            text_weights=config.model.text_weights if starts_new and name != "english" else None,
            start_weights=config.model.start_weights if before is None else None,
            save_openai=name == "english",
            validate=name != "english",
            launcher=config.launch.launcher,
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
                plan=training_stage.tasks,
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
