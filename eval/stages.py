"""The evaluation stages of a run: embed, index, retrieval, baseline."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from eval.metrics.recall import RetrievalScores
from pipeline.core import store
from pipeline.core.config import IN_DIGEST_IF_SET
from pipeline.core.evaluation_sets import EvaluationSet, evaluation_named, evaluations_of
from pipeline.core.facts import Facts
from pipeline.core.stage import Context, Outcome, Progress, Show, Stage, Task

if TYPE_CHECKING:
    from eval.datasets.cnclip_tsv import RetrievalSet


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Settings that all scored models share."""

    stages: tuple[str, ...]  # training stages whose models are scored, in order; the last one is final
    vocabulary: str | None  # unset: the vocabulary stage's
    context_length: int  # tokens with [CLS] and [SEP]
    precision: Literal["float32", "bf16"] = field(default="float32", metadata=IN_DIGEST_IF_SET)  # of products


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedConfig:
    """`[embed]`: how evaluation sets are embedded, those of `[[classification]]` too."""

    precision: Literal["float32", "bf16"] = field(default="float32", metadata=IN_DIGEST_IF_SET)
    """Precision of the models' matrix products. `bf16` is for GPUs, and keeps some three digits of a feature.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """`[index]`: how features are searched."""

    factory: str = "Flat"
    """FAISS factory string; `Flat` is exact. Other indices are tuned to recall 0.99 on their own rows, never
    on the set's queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """What the report shows besides the numbers."""

    score: EvaluationConfig | None  # None: a run without a model
    model: str | None
    training_stages: tuple[str, ...]  # in order, with stages that are not scored
    titles: Mapping[str, str]  # stage → what it does


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOnSet(Facts):
    """A task of `embed` or `retrieval`: one evaluation set under the model of one training stage."""

    evaluation: str
    stage: str

    @property
    def folder(self) -> str:
        """Return where its files lie, relative to the stage's folder."""
        return folder_of(self.evaluation, self.stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedFolder(Facts):
    """A task of `index`: one folder of features."""

    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalFacts(Facts):
    """What a task of `retrieval` notes in its receipt for the report."""

    evaluation: str
    stage: str
    scores: RetrievalScores


def folder_of(evaluation: str, stage: str) -> str:
    """Return where the files of one set under one model lie, relative to the stage's folder."""
    return f"{evaluation}/{stage}"


def _pairs(config: EvaluationConfig, context: Context) -> list[tuple[ModelOnSet, EvaluationSet]]:
    """Return every model on every evaluation set, in order."""
    return [
        (ModelOnSet(evaluation=item.name, stage=stage), item)
        for item in evaluations_of(context)
        for stage in config.stages
    ]


def plan_embed(config: EvaluationConfig, context: Context) -> list[Task]:
    """Return one task for each model and evaluation set."""
    vocabulary = {}
    if config.vocabulary is None:
        learned = context.parents["vocabulary"].shards  # named by their relative paths: a run may move
        vocabulary = {shard.path: shard.digest for shard in learned if shard.path == "caption.txt"}
    return [
        Task(
            f"{pair.evaluation}.{pair.stage}",
            {
                **vocabulary,
                "evaluation": item.digest,
                "model": context.shards_of(pair.stage, "model.safetensors")[0].digest,
            },
            pair.to_json(),
        )
        for pair, item in _pairs(config, context)
    ]


def run_embed(config: EvaluationConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Embed one evaluation set by one model, in clip-retrieval's layout."""
    from eval.datasets.cnclip_tsv import check_scorable
    from eval.datasets.retrieval_set import read_retrieval_set
    from eval.features.encoder import ModelSource, load_encoder
    from eval.features.evaluation_set import embed_evaluation

    pair = ModelOnSet.from_json(task.arguments)
    item = evaluation_named(context, pair.evaluation)
    evaluation = read_retrieval_set(item.folder, item.name)
    check_scorable(evaluation)
    folder = pair.folder
    vocabulary = config.vocabulary or context.path_in("vocabulary", "caption.txt")
    weights = context.path_in(pair.stage, "model.safetensors")
    source = ModelSource(weights, vocabulary, config.context_length, precision=config.precision)
    encoder = load_encoder(source)
    encoder = replace(encoder, show=_counting_both_sides(progress, evaluation))
    embed_evaluation(encoder, evaluation, context.path(folder))
    outputs = {
        f"{folder}/img_emb/img_emb_0.npy": evaluation.num_images,
        f"{folder}/text_emb/text_emb_0.npy": evaluation.num_texts,
        f"{folder}/metadata/metadata_0.parquet": evaluation.num_images,
        f"{folder}/text_metadata/metadata_0.parquet": evaluation.num_texts,
        f"{folder}/model.json": 0,
    }
    count = evaluation.num_images + evaluation.num_texts
    return Outcome(outputs, num_in=count, num_kept=count)


def _counting_both_sides(progress: Progress, evaluation: "RetrievalSet") -> Show:
    """Return a Show that counts a set's images and then its texts on one bar."""
    of_both = evaluation.num_images + evaluation.num_texts

    def show(label: str, unit: str) -> Progress:
        before = 0 if unit == "image" else evaluation.num_images

        def shown(done: int, total: int, text: str = "") -> None:
            progress(before + done, of_both, f"{unit}s")

        return shown

    return show


def plan_index(config: IndexConfig, context: Context) -> list[Task]:
    """Return one task for each folder of features, which has both sides."""
    read = {
        shard.path: shard
        for shard in context.parents["embed"].shards
        if shard.path.endswith((".npy", "/model.json"))
    }
    folders = sorted({path.split("/img_emb/")[0] for path in read if "/img_emb/" in path})
    return [
        Task(
            folder.replace("/", "."),
            {path: shard.digest for path, shard in read.items() if path.startswith(f"{folder}/")},
            IndexedFolder(folder=folder).to_json(),
        )
        for folder in folders
    ]


def run_index(config: IndexConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Build `image.index` and `text.index` of one folder of features, and note which model these are of."""
    from eval.features.layout import EMBEDDING_FOLDERS, Side, vectors_path
    from eval.features.model_identity import read_identity, write_identity
    from eval.index.flat import build_index, read_index

    folder = IndexedFolder.from_json(task.arguments).folder
    outputs = {}
    if (identity := read_identity(context.path_in("embed", folder))) is not None:
        write_identity(context.path(folder), identity)
        outputs[f"{folder}/model.json"] = 0
    features: dict[Side, str] = {
        side: context.path_in("embed", vectors_path(folder, side)) for side in EMBEDDING_FOLDERS
    }
    for side, vectors in features.items():
        path = f"{folder}/{side}.index"
        asking = features["text" if side == "image" else "image"]
        tuned = build_index(vectors, context.path(path), factory=config.factory, queries_path=asking)
        outputs[path] = int(read_index(context.path(path)).ntotal)
        if tuned is not None:
            store.write_text(
                context.path(f"{folder}/{side}.search.json"), json.dumps(asdict(tuned), indent=1)
            )
            outputs[f"{folder}/{side}.search.json"] = 0
    count = sum(outputs.values())
    return Outcome(outputs, num_in=count, num_kept=count)


def plan_retrieval(config: EvaluationConfig, context: Context) -> list[Task]:
    """Return one task for each model and evaluation set."""
    digests = {
        shard.path: shard.digest for parent in ("embed", "index") for shard in context.parents[parent].shards
    }
    return [
        Task(
            f"{pair.evaluation}.{pair.stage}",
            {
                "evaluation": item.digest,
                **item.scored_by,
                **{path: digest for path, digest in digests.items() if path.startswith(f"{pair.folder}/")},
            },
            pair.to_json(),
        )
        for pair, item in _pairs(config, context)
    ]


def run_retrieval(config: EvaluationConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write prediction and score files of the scored directions; the receipt holds the scores."""
    from eval.datasets.retrieval_set import read_retrieval_set
    from eval.retrieval.predictions import retrieve as search_and_score

    pair = ModelOnSet.from_json(task.arguments)
    item = evaluation_named(context, pair.evaluation)
    folder = pair.folder
    evaluation = read_retrieval_set(item.folder, item.name)
    result = search_and_score(
        evaluation, context.path_in("embed", folder), context.path_in("index", folder), context.path(folder)
    )
    written = {f"{item.name}.predictions.jsonl": evaluation.num_texts, f"{item.name}.scores.json": 0}
    if evaluation.image_to_text:
        written |= {
            f"{item.name}.tr.predictions.jsonl": evaluation.num_images,
            f"{item.name}.tr.scores.json": 0,
        }
    outputs = {f"{folder}/{name}": num for name, num in written.items()}
    return Outcome(
        outputs,
        num_in=evaluation.num_texts,
        num_kept=evaluation.num_texts,
        extra=RetrievalFacts(evaluation=pair.evaluation, stage=pair.stage, scores=result.scores).to_json(),
    )


def plan_baseline(config: None, context: Context) -> list[Task]:
    """Return one task: it reads the training images once for all evaluation sets."""
    inputs = {shard.path: shard.digest for shard in context.parents["shards"].shards}
    for item in evaluations_of(context):
        inputs |= {f"evaluation {item.name}": item.digest, **item.scored_by}
    return [Task("baseline", inputs)]


def run_baseline(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    """Score what a model must beat: chance, and a pixel nearest neighbour over the training images."""
    from eval.datasets.cnclip_tsv import check_scorable
    from eval.datasets.retrieval_set import read_retrieval_set
    from eval.retrieval.baseline import PixelBaseline, chance

    pixel = PixelBaseline.from_shards([shard.path for shard in context.shards_of("shards", ".tar")])
    scores = {}
    num_texts = 0
    for item in evaluations_of(context):
        evaluation = read_retrieval_set(item.folder, item.name)
        check_scorable(evaluation)
        scores[item.name] = {"pixel": pixel.evaluate(evaluation).scores, "chance": chance(evaluation)}
        num_texts += evaluation.num_texts
    store.write_text(context.path("baselines.json"), json.dumps(scores, indent=1, ensure_ascii=False))
    return Outcome({"baselines.json": num_texts}, num_in=num_texts, num_kept=num_texts)


def embed_stage(config: EvaluationConfig, *, learned: tuple[str, ...], sets_from: tuple[str, ...]) -> Stage:
    """Return the stage that embeds every evaluation set by every scored model.

    `learned` names the vocabulary stage, if the run has one; `sets_from` the stages that know the sets.
    """
    return Stage(
        "embed",
        title="features of the evaluation sets, in clip-retrieval's layout",
        version=3,
        config=config,
        parents=(*sets_from, *learned, *config.stages),
        plan=plan_embed,
        run=run_embed,
        parallel=False,  # a model in memory for each process is too much
    )


def index_stage(config: IndexConfig) -> Stage:
    """Return the stage that builds an index of each set's images and texts."""
    return Stage(
        "index",
        title="FAISS index of each set's images and texts",
        version=2 if config.factory == "Flat" else 4,  # version 4 tunes what is not exact on its own rows
        config=config,
        parents=("embed",),
        plan=plan_index,
        run=run_index,
    )


def retrieval_stage(config: EvaluationConfig, *, sets_from: tuple[str, ...]) -> Stage:
    """Return the stage that writes predictions and scores."""
    return Stage(
        "retrieval",
        title="predictions and Recall@K in the official file formats",
        version=1,
        config=config,
        parents=(*sets_from, "embed", "index"),
        plan=plan_retrieval,
        run=run_retrieval,
    )


def baseline_stage(*, sets_from: tuple[str, ...]) -> Stage:
    """Return the stage that scores chance and the pixel nearest neighbour."""
    return Stage(
        "baseline",
        title="pixel nearest neighbour and chance, to compare with",
        version=2,
        config=None,
        parents=(*sets_from, "shards"),
        plan=plan_baseline,
        run=run_baseline,
    )
