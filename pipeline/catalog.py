"""The whole run on one page: every stage, in order. The only module that imports all the others.

A run's TOML has one table for each stage, with the stage's name. The functions of a stage are imported when
it runs, so that a plan prints at once.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import AfterValidator, Discriminator

from data_prep import corpus
from data_prep.concepts import stages as concepts
from data_prep.concepts.stages import BalanceConfig, ConceptsConfig
from data_prep.corpora.demo import DemoConfig
from data_prep.corpora.emoji import EmojiConfig
from data_prep.corpora.pictures.corpus import PicturesConfig
from data_prep.corpus import SourcesConfig, TablesConfig
from data_prep.dedup import exact as dedup
from data_prep.dedup import near_duplicates as dedup_image
from data_prep.dedup.exact import DedupConfig
from data_prep.dedup.near_duplicates import DedupImageConfig
from data_prep.download import stage as download
from data_prep.download.config import DownloadConfig
from data_prep.features import classify, semantic
from data_prep.features import stage as image_features
from data_prep.features.classify import ClassifierSource
from data_prep.features.semantic import DedupSemanticConfig
from data_prep.features.stage import ImageFeaturesConfig
from data_prep.filters import image as filter_image
from data_prep.filters import score
from data_prep.filters import text as filter_text
from data_prep.filters.image import FilterImageConfig
from data_prep.filters.score import FilterScoreConfig, ScoreConfig
from data_prep.filters.text import FilterTextConfig
from data_prep.shards import lock, split
from data_prep.shards import stage as shards
from data_prep.shards.split import SplitConfig
from data_prep.shards.stage import ShardsConfig
from eval import stages as evaluation_stages
from eval.report import stage as report_stage
from eval.stages import EmbedConfig, IndexConfig
from eval.zeroshot import stage as zeroshot_stage
from eval.zeroshot.stage import ClassificationSource, ZeroshotConfig
from pipeline import image_encoders, image_heads, pair_scorers
from pipeline.core.config import build, find_recipe, read_run
from pipeline.core.evaluation_sets import SET_ASIDE, EvaluationSource
from pipeline.core.records import ConfigError
from pipeline.core.run import Run
from pipeline.core.stage import Stage
from pipeline.launch.config import LaunchConfig
from training import stages as training_stage
from training import vocabulary
from training.checkpoint.selection import check_sets
from training.config.phases import with_phases
from training.config.recipes import fast_recipe, finetune_recipe, larger_recipe, paper_recipe
from training.config.tracking import TrackingConfig
from training.config.train import TrainConfig, check_fits
from training.model.config import MODELS
from training.vocabulary import VocabularyConfig

# The program that each rank of a training stage runs.
RANK_MODULE = "pipeline.rank"
_TRAINING = ("english", "stage1", "stage2", "finetune")  # in order
_PRETRAINING_RECIPES = {"paper": paper_recipe, "larger": larger_recipe, "fast": fast_recipe}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTable:
    """`[run]`: the folder of the run and how its tasks are distributed."""

    folder: str
    """Folder of the run: a local path or an fsspec URL. Each stage has a folder in it."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed for the order of samples, augmentation, dropout and new weights."""
    executor: Literal["local", "ray"] = "local"
    """How to run the independent tasks of a stage: in processes of this machine, or with Ray."""
    processes: Annotated[int, Ge(1)] = 2
    """Number of tasks at once if the executor is `local`."""
    max_failed_tasks: Annotated[int, Ge(0)] = 0
    """Tasks of `filter_text`, `download` or `filter_image` that may fail, each three times, before the run
    stops; other stages stop at the first. Their rows are dropped as `partition_failed`, and `cnclip retry`
    brings back those of `download` and `filter_image`.
    """


_START_WEIGHTS = "start_weights is a whole model: leave out image_weights, text_weights, [english]"


def known_model(name: str) -> str:
    """Refuse a name that is no model's."""
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; known: {', '.join(MODELS)}")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTable:
    """`[model]`: the size of the model and its starting weights."""

    name: Annotated[str, AfterValidator(known_model)]
    """Size of the model, from `training/model/config.py`."""
    vocabulary: str | None = None
    """A `vocab.txt`, a folder or a model id. Unset: learn one from the captions."""
    image_weights: str | None = None
    """Path, name or hub id of an English CLIP for the image tower. Unset: `[english]`, else random."""
    text_weights: str | None = None
    """Path or hub id of a Chinese BERT for the text tower. Unset: random weights."""
    start_weights: str | None = None
    """Path, name (ViT-B-16) or hub id of a whole Chinese CLIP of any resolution; excludes the two above."""

    def __post_init__(self) -> None:
        if self.start_weights and (self.image_weights or self.text_weights):
            raise ValueError(_START_WEIGHTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run's TOML file."""

    run: RunTable
    """Folder, seed and processes of the run."""
    corpus: Annotated[
        DemoConfig | EmojiConfig | PicturesConfig | TablesConfig | SourcesConfig, Discriminator("kind")
    ]
    """What the corpus is made from; its `kind` selects one of five tables."""
    model: ModelTable | None = None
    """The model and its starting weights. Unset, and without training stages: a run of the corpus only."""
    evaluation: tuple[EvaluationSource, ...] = ()
    """Retrieval sets. Unset: the rows that `[split]` sets aside."""
    classification: tuple[ClassificationSource, ...] = ()
    """Classification sets."""
    filter_text: FilterTextConfig = field(default_factory=FilterTextConfig)
    """Rules for captions."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Exact duplicates."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    """Download of the images."""
    filter_image: FilterImageConfig = field(default_factory=FilterImageConfig)
    """Rules for images."""
    dedup_image: DedupImageConfig | None = None
    """Near-duplicate detection. Unset: keep copies of images, as the paper does."""
    image_features: ImageFeaturesConfig | None = None
    """Features of the images, for semantic duplicates and classifiers. Unset: none."""
    dedup_semantic: DedupSemanticConfig | None = None
    """Semantic duplicates. Unset: keep them, as the paper does."""
    score: ScoreConfig | None = None
    """Scores by a model. Unset: rows without a score from their source are not judged by score."""
    filter_score: FilterScoreConfig | None = None
    """Threshold on these scores. Unset: the paper's."""
    classifier: tuple[ClassifierSource, ...] = ()
    """Classifiers of the images. Unset: none, as in the paper."""
    concepts: ConceptsConfig | None = None
    """Concepts of the captions, counted. Unset: none are."""
    balance: BalanceConfig | None = None
    """Balance of these concepts. Unset: keep every row, as the paper does."""
    split: SplitConfig | None = None
    """Rows set aside for validation. Unset: none."""
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    """Packing."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """Vocabulary that is learned from the captions."""
    english: TrainConfig | None = None
    """English training that replaces OpenAI's CLIP if its weights are not available."""
    stage1: TrainConfig | None = None
    """Image tower locked (paper, 2.3)."""
    stage2: TrainConfig | None = None
    """Everything trained (paper, 2.3)."""
    finetune: TrainConfig | None = None
    """Training on the pairs of a downstream task (paper, A.3)."""
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    """Features of the evaluation sets."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """FAISS index."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Slurm cluster."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where training sends its curves."""
    zeroshot: ZeroshotConfig = field(default_factory=ZeroshotConfig)
    """Zero-shot classification."""

    def __post_init__(self) -> None:
        if self.trains:
            self._check_training()
        elif unused := self._of_training():
            raise ValueError(
                f"{unused}: nothing to train; give [stage1], [stage2] or both, or [finetune], or leave out"
                f" [{unused}] for a run without a model"
            )
        for name in ("columns", "together"):
            if getattr(self.vocabulary, name) != getattr(VocabularyConfig(), name):
                raise ValueError(
                    f"vocabulary.{name}: the run takes it from the caption_column and caption_weights of its"
                    " trainings; leave it out"
                )
        if self.filter_score is not None and self.score is None:
            raise ValueError(
                "filter_score: nothing to judge without [score]; give it, or filter_text.min_score"
            )

        if self.dedup_semantic is not None and self.image_features is None:
            raise ValueError(
                "dedup_semantic: no features to compare; give [image_features] with image_encoder or model"
            )
        if self.classifier and self.image_features is None:
            raise ValueError(
                "classifier: no features to classify; give [image_features] with image_encoder or model"
            )
        names = [item.name for item in self.classifier]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"classifier: two have the name {repeated!r}; give each its own")
        if self.balance is not None and self.concepts is None:
            raise ValueError(
                "balance: no concepts to balance; give [concepts] with files of entries, ngrams, or both"
            )

    def _check_training(self) -> None:
        if self.model is None:
            raise ValueError('model: required, but not set; name a size, as in [model] name = "ViT-B-16"')
        if self.english is not None and self.model.start_weights:
            raise ValueError(f"model.{_START_WEIGHTS}")
        if self.english is not None and self.model.image_weights:
            raise ValueError(
                "model.image_weights and [english] both give the image tower: leave one of them out"
                ' (without = ["english"] in a run with a base)'
            )
        if not self.makes_its_corpus and not self.evaluation and self.split is None:
            raise ValueError(
                "no [[evaluation]]; name at least one set with name and folder, or set rows aside: [split]"
            )

    def _of_training(self) -> str | None:
        """Return the first table that is set and does nothing without a training stage."""
        unset = {
            "model": None,
            "english": None,
            "classification": (),
            "vocabulary": VocabularyConfig(),
            "embed": EmbedConfig(),
            "index": IndexConfig(),
            "tracking": TrackingConfig(),
            "zeroshot": ZeroshotConfig(),
        }
        return next((name for name, value in unset.items() if getattr(self, name) != value), None)

    @property
    def trains(self) -> bool:
        """Whether a model is trained; without one the run ends with the shards and the corpus's report."""
        return not (self.stage1 is None and self.stage2 is None and self.finetune is None)

    @property
    def sets_from(self) -> tuple[str, ...]:
        """Return the stages that know the evaluation sets: without one, the rows of [split] are the set."""
        has_sets = self.makes_its_corpus or self.evaluation or self.split is None
        return ("corpus",) if has_sets else ("corpus", SET_ASIDE)

    @property
    def makes_its_corpus(self) -> bool:
        """Return whether the project generates the corpus, which then has its own evaluation sets."""
        return isinstance(self.corpus, DemoConfig | EmojiConfig | PicturesConfig)


def load(path: str, overrides: Sequence[str] = ()) -> tuple[Run, RunConfig]:
    """Read, override and check a run's TOML (a path, or the name of a shipped recipe)."""
    path = find_recipe(path)
    return resolve(read_run(path, overrides), path)


def resolve(table: dict[str, Any], path: str) -> tuple[Run, RunConfig]:
    """Check the table of a run's TOML from `path`."""
    try:
        corpus.refuse_misplaced_kinds(table.get("corpus"), path)
        config = build(RunConfig, _with_paper_recipes(table, path), path)
        for name in _TRAINING:
            if (train := getattr(config, name)) is not None and config.model is not None:
                for phase, settings in phases_of(name, train):
                    check_fits(settings, MODELS[config.model.name], phase)
                if not config.makes_its_corpus:
                    sets = [item.name for item in config.evaluation] or [SET_ASIDE]
                    check_sets(train, sets if name != "english" else [], name)
        return make_run(config), config
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(path) else f"{path}: {text}") from None


def _with_paper_recipes(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Fill in stages with `recipe = …` from training/recipes; values in the file take precedence."""
    filled = dict(table)
    own_model = table.get("model")
    model = own_model.get("name", "") if isinstance(own_model, dict) else ""
    names: tuple[Literal["stage1", "stage2", "finetune"], ...] = ("stage1", "stage2", "finetune")
    for stage in names:
        own = table.get(stage)
        if not isinstance(own, dict) or "recipe" not in own or not isinstance(model, str):
            continue
        if not isinstance(own["recipe"], str) or not isinstance(own.get("augment", {}), dict):
            raise ConfigError(f"{where}: {stage}: recipe must be a string, and augment a table")
        if stage == "finetune":
            paper = dataclasses.asdict(finetune_recipe(model, own["recipe"]))
        elif own["recipe"] in _PRETRAINING_RECIPES:
            paper = dataclasses.asdict(_PRETRAINING_RECIPES[own["recipe"]](model, stage))
        else:
            known = ", ".join(f'"{name}"' for name in _PRETRAINING_RECIPES)
            raise ConfigError(f"{where}: {stage}.recipe: found {own['recipe']!r}; recipes are {known}")
        augment = {**paper["augment"], **own.get("augment", {})}
        del paper["lanes"]  # derived from the batch, which the file may change
        filled[stage] = {**paper, **own, "augment": augment}
        del filled[stage]["recipe"]
    return filled


def make_run(config: RunConfig) -> Run:
    """The stages of a run, in order."""
    stages = [
        corpus.stage(
            corpus.CorpusStageConfig(
                corpus=config.corpus, evaluations=config.evaluation, are_scored=config.trains
            )
        ),
        filter_text.stage(config.filter_text),
        dedup.stage(config.dedup),
        download.stage(config.download),
        filter_image.stage(config.filter_image),
    ]
    judging, rows = _row_stages(config)
    stages += [*judging, *_shard_stages(config, rows)]
    stages.append(lock.stage(stages))
    scores, train_stages = None, list[Stage]()
    if config.model is not None:
        train_stages = _training_stages(config, config.model)
        scores, after = _model_stages(config, config.model, train_stages)
        stages += after
    shown = report_stage.ReportConfig(
        score=scores,
        model=config.model.name if config.model is not None else None,
        training_stages=tuple(stage.name for stage in train_stages),
        titles={stage.name: stage.title for stage in stages},
    )
    stages.append(report_stage.stage(shown, parents=tuple(stage.name for stage in stages)))
    table = config.run
    return Run(
        table.folder, table.seed, table.executor, table.processes, tuple(stages), table.max_failed_tasks
    )


def _model_stages(
    config: RunConfig, model: ModelTable, train_stages: Sequence[Stage]
) -> tuple[evaluation_stages.EvaluationConfig, list[Stage]]:
    """What a run does with its shards: vocabulary, training, and the scores of what was trained."""
    # Scored and shown: the stages that end in a Chinese model, in order; the last one is final.
    scored = tuple(stage.name for stage in train_stages if stage.name in _TRAINING[1:])
    scores = evaluation_stages.EvaluationConfig(
        stages=scored,
        vocabulary=model.vocabulary,
        context_length=max(
            train.context_length for train in (config.stage1, config.stage2, config.finetune) if train
        ),
        precision=config.embed.precision,
    )
    learned = () if model.vocabulary else ("vocabulary",)
    stages: list[Stage] = []
    columns = _learned_columns(train_stages)
    if columns:
        together = _learned_together(train_stages) or None
        stages.append(
            vocabulary.stage(dataclasses.replace(config.vocabulary, columns=columns, together=together))
        )
    stages += train_stages
    stages += [
        evaluation_stages.embed_stage(scores, learned=learned, sets_from=config.sets_from),
        evaluation_stages.index_stage(config.index),
        evaluation_stages.retrieval_stage(scores, sets_from=config.sets_from),
        evaluation_stages.baseline_stage(sets_from=config.sets_from),
    ]
    if config.classification:
        sets = zeroshot_stage.ZeroshotStageConfig(
            zeroshot=config.zeroshot,
            sets=config.classification,
            stage=scored[-1],
            vocabulary=model.vocabulary,
            context_length=scores.context_length,
            precision=scores.precision,
        )
        stages.append(zeroshot_stage.stage(sets, learned=learned))
    return scores, stages


def _row_stages(config: RunConfig) -> tuple[list[Stage], str]:
    """Return the stages that a run requests between the downloaded images and the shards.

    Also returns the one whose rows are packed.
    """
    stages: list[Stage] = []
    before = "filter_image"
    if config.dedup_image is not None:
        stages += dedup_image.stages(config.dedup_image, rows=before)
        before = "dedup_image"
    if config.image_features is not None:
        stages.append(
            image_features.stage(
                config.image_features,
                rows=before,
                identify=functools.partial(image_encoders.identify, run_folder=config.run.folder),
                load=functools.partial(image_encoders.load, run_folder=config.run.folder),
                parallel=config.run.executor == "ray",  # as for [score]
            )
        )
    if config.dedup_semantic is not None:
        stages += semantic.stages(config.dedup_semantic, rows=before)
        before = "dedup_semantic"
    if config.score is not None:
        stages += [
            score.stage(
                config.score,
                rows=before,
                identify=functools.partial(pair_scorers.identify_pair, run_folder=config.run.folder),
                load=functools.partial(pair_scorers.load, run_folder=config.run.folder),
                # On one machine each process would hold a copy of both encoders.
                parallel=config.run.executor == "ray",
                features=config.image_features is not None,
            ),
            score.filter_stage(config.filter_score or FilterScoreConfig(), rows=before),
        ]
        before = "filter_score"
    if config.classifier:
        stages += classify.stages(
            config.classifier, rows=before, identify=image_heads.identify, load=image_heads.load
        )
        before = "filter_classes"
    if config.concepts is not None:
        stages += concepts.count_stages(config.concepts, rows=before)
    if config.balance is not None:
        stages.append(concepts.stage(config.balance, rows=before))
        before = "balance"
    return stages, before


def _shard_stages(config: RunConfig, rows: str) -> list[Stage]:
    """Return the stages that pack the kept rows of the stage `rows`, with [split] in two parts."""
    packing = shards.stage(
        config.shards, rows=rows, has_scores=config.score is not None, has_split=config.split is not None
    )
    if config.split is None:
        return [packing]
    return [
        split.stage(config.split, rows=rows),
        packing,
        shards.validation_stage(config.shards, rows=rows),
    ]


def _training_stages(config: RunConfig, model: ModelTable) -> list[Stage]:
    """english (where asked for) → stage1 → stage2 → finetune: each hands its weights to the next (2.3).

    The phases of a stage come before it.
    """
    stages: list[Stage] = []
    before: str | None = None
    trainings = (
        (*named, stage)
        for stage in _TRAINING
        if (whole := getattr(config, stage)) is not None
        for named in phases_of(stage, whole)
    )
    for name, train, stage in trainings:
        is_english = stage == "english"
        starts_new = before in (None, "english")
        job = training_stage.TrainStageConfig(
            train=train,
            model=model.name,
            vocabulary=model.vocabulary if not is_english else None,
            start_stage=None if starts_new else before,
            image_stage="english" if before == "english" else None,
            image_weights=model.image_weights if before is None else None,
            text_weights=model.text_weights if starts_new and not is_english else None,
            start_weights=model.start_weights if before is None else None,
            save_openai=name == "english",
            validate=not is_english,
            launcher=config.launch.launcher,
            tracking=config.tracking,
        )
        stages.append(
            training_stage.stage(name, job, before=before, entry=RANK_MODULE, sets_from=config.sets_from)
        )
        before = name
    return stages


def phases_of(stage: str, train: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Return what a training stage consists of, `training.config.phases.with_phases`.

    Raises:
        ConfigError: if the settings of a phase do not fit together.
    """
    try:
        return with_phases(stage, train)
    except ValueError as error:
        raise ConfigError(f"[{stage}] {error}") from None


def _learned_columns(train_stages: Sequence[Stage]) -> tuple[str, ...]:
    """Caption columns that need a vocabulary of their own."""
    configs = [stage.config for stage in train_stages if stage.config.vocabulary is None]
    return tuple(sorted({job.train.caption_column for job in configs}))


def _learned_together(train_stages: Sequence[Stage]) -> dict[str, tuple[str, ...]]:
    """Vocabularies that cover more columns than their own, since trainings draw captions from these too.

    The stages that share a vocabulary hand their weights on, so that it is one for all of their columns.
    """
    together: dict[str, set[str]] = {}
    for stage in train_stages:
        train = stage.config.train
        if stage.config.vocabulary is None:
            together.setdefault(train.caption_column, set()).update(train.weight_of_columns)
    return {name: tuple(sorted(columns)) for name, columns in together.items() if columns != {name}}
