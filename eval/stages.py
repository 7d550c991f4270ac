"""The evaluation stages of a run: embed, index, retrieval, baseline, report."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.evaluation_sets import EvaluationSet, evaluation_named, evaluations_of
from pipeline.core.stage import Context, Outcome, Progress, Task

if TYPE_CHECKING:
    from eval.paper.comparison import Comparison
    from eval.report.data import ReportData


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """What is scored: the training stages, in order (the last is the final model), and how texts are cut."""

    stages: tuple[str, ...]
    vocabulary: str | None  # unset: the vocabulary stage's
    context_length: int  # tokens with [CLS] and [SEP]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """`[index]`: how features are searched."""

    factory: str = "Flat"  # FAISS factory string; Flat is exact


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """What the report shows beside the numbers."""

    score: ScoreConfig
    model: str
    training_stages: tuple[str, ...]  # in order, with stages that are not scored
    titles: Mapping[str, str]  # stage → what it does


def _pairs(config: ScoreConfig, context: Context) -> list[tuple[str, EvaluationSet]]:
    """(training stage, evaluation set) in order."""
    return [(stage, item) for item in evaluations_of(context) for stage in config.stages]


def _folder(name: str, stage: str) -> str:
    return f"{name}/{stage}"


def embed_tasks(config: ScoreConfig, context: Context) -> list[Task]:
    """One task for each model and evaluation set."""
    vocabulary = {}
    if config.vocabulary is None:
        learned = context.parents["vocabulary"].shards  # named by their relative paths: a run may move
        vocabulary = {shard.path: shard.digest for shard in learned if shard.path == "caption.txt"}
    return [
        Task(
            f"{item.name}.{stage}",
            {
                **vocabulary,
                "evaluation": item.digest,
                "model": context.shards_of(stage, "model.safetensors")[0].digest,
            },
            {"evaluation": item.name, "stage": stage},
        )
        for stage, item in _pairs(config, context)
    ]


def embed(config: ScoreConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Features of one evaluation set under one model, in clip-retrieval's layout."""
    from eval.datasets.cnclip_tsv import check_scorable
    from eval.datasets.retrieval_set import read_retrieval_set
    from eval.features.evaluation_set import embed_evaluation

    stage = task.arguments["stage"]
    item = evaluation_named(context, task.arguments["evaluation"])
    evaluation = read_retrieval_set(item.folder, item.name)
    check_scorable(evaluation)
    folder = _folder(item.name, stage)
    embed_evaluation(
        context.path_in(stage, "model.safetensors"),
        config.vocabulary or context.path_in("vocabulary", "caption.txt"),
        evaluation,
        context.path(folder),
        context_length=config.context_length,
    )
    outputs = {
        f"{folder}/img_emb/img_emb_0.npy": evaluation.num_images,
        f"{folder}/text_emb/text_emb_0.npy": evaluation.num_texts,
        f"{folder}/metadata/metadata_0.parquet": evaluation.num_images,
        f"{folder}/text_metadata/metadata_0.parquet": evaluation.num_texts,
        f"{folder}/model.json": 0,
    }
    count = evaluation.num_images + evaluation.num_texts
    return Outcome(outputs, num_in=count, num_kept=count)


def index_tasks(config: IndexConfig, context: Context) -> list[Task]:
    """One task for each folder of features, both sides."""
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
            {"folder": folder},
        )
        for folder in folders
    ]


def build_indices(config: IndexConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """`image.index` and `text.index` of one folder of features, and which model these are of."""
    from eval.features.model_identity import read_identity, write_identity
    from eval.index.flat import build_index, read_index

    folder = task.arguments["folder"]
    outputs = {}
    if (identity := read_identity(context.path_in("embed", folder))) is not None:
        write_identity(context.path(folder), identity)
        outputs[f"{folder}/model.json"] = 0
    for side, vectors in (("image", "img_emb/img_emb_0.npy"), ("text", "text_emb/text_emb_0.npy")):
        path = f"{folder}/{side}.index"
        build_index(context.path_in("embed", folder, vectors), context.path(path), factory=config.factory)
        outputs[path] = int(read_index(context.path(path)).ntotal)
    count = sum(outputs.values())
    return Outcome(outputs, num_in=count, num_kept=count)


def retrieval_tasks(config: ScoreConfig, context: Context) -> list[Task]:
    """One task for each model and evaluation set."""
    digests = {
        shard.path: shard.digest for parent in ("embed", "index") for shard in context.parents[parent].shards
    }
    return [
        Task(
            f"{item.name}.{stage}",
            {
                "evaluation": item.digest,
                **{
                    path: digest
                    for path, digest in digests.items()
                    if path.startswith(f"{_folder(item.name, stage)}/")
                },
            },
            {"evaluation": item.name, "stage": stage},
        )
        for stage, item in _pairs(config, context)
    ]


def retrieve(config: ScoreConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Prediction and score files of both directions; the scores go into the receipt for the report."""
    from eval.datasets.retrieval_set import read_retrieval_set
    from eval.retrieval.predictions import retrieve as search_and_score

    item = evaluation_named(context, task.arguments["evaluation"])
    folder = _folder(item.name, task.arguments["stage"])
    evaluation = read_retrieval_set(item.folder, item.name)
    scores = search_and_score(
        evaluation, context.path_in("embed", folder), context.path_in("index", folder), context.path(folder)
    )
    outputs = {
        f"{folder}/{name}": num
        for name, num in (
            (f"{item.name}.predictions.jsonl", evaluation.num_texts),
            (f"{item.name}.tr.predictions.jsonl", evaluation.num_images),
            (f"{item.name}.scores.json", 0),
            (f"{item.name}.tr.scores.json", 0),
        )
    }
    return Outcome(
        outputs,
        num_in=evaluation.num_texts,
        num_kept=evaluation.num_texts,
        extra={"evaluation": item.name, "stage": task.arguments["stage"], "scores": dict(scores)},
    )


def baseline_tasks(config: None, context: Context) -> list[Task]:
    """One task: the training images are read once for every evaluation set."""
    inputs = {shard.path: shard.digest for shard in context.parents["shards"].shards}
    inputs |= {f"evaluation {item.name}": item.digest for item in evaluations_of(context)}
    return [Task("baseline", inputs)]


def baseline(config: None, context: Context, task: Task, progress: Progress) -> Outcome:
    """What a score must beat: chance, and a pixel nearest neighbour over the training images."""
    from eval.datasets.cnclip_tsv import check_scorable
    from eval.datasets.retrieval_set import read_retrieval_set
    from eval.retrieval.baseline import PixelBaseline, chance

    pixel = PixelBaseline.from_shards([shard.path for shard in context.shards_of("shards", ".tar")])
    scores = {}
    num_texts = 0
    for item in evaluations_of(context):
        evaluation = read_retrieval_set(item.folder, item.name)
        check_scorable(evaluation)
        scores[item.name] = {"pixel": pixel.scores(evaluation), "chance": chance(evaluation)}
        num_texts += evaluation.num_texts
    store.write_text(context.path("baselines.json"), json.dumps(scores, indent=1, ensure_ascii=False))
    return Outcome({"baselines.json": num_texts}, num_in=num_texts, num_kept=num_texts)


def report_tasks(config: ReportConfig, context: Context) -> list[Task]:
    """One task: it reads every manifest."""
    return [Task("report", {name: digest(manifest.to_json()) for name, manifest in context.parents.items()})]


def report(config: ReportConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """`report.html`, `report.json` and `headline.txt`. No times in them: the same run, the same bytes."""
    from eval.report.files import headline, write_report

    data = _report_data(config, context)
    write_report(data, context.path("report.html"), context.path("report.json"))
    store.write_text(context.path("headline.txt"), headline(data))
    count = len(data.evaluations)
    return Outcome(
        {"report.html": count, "report.json": count, "headline.txt": count}, num_in=count, num_kept=count
    )


def _report_data(config: ReportConfig, context: Context) -> "ReportData":
    from data_prep.accounting import histograms
    from data_prep.accounting.funnel import STEPS, by_source, count_planted, threshold_notes
    from eval.datasets.retrieval_set import read_retrieval_set
    from eval.report.data import FunnelStep, Histogram, PlantedClass, ReportData, RowCounts, StageFacts
    from eval.report.sources import make_gallery, read_training_metrics

    final = config.score.stages[-1]
    manifests = context.parents
    found = list(manifests["retrieval"].extra.values())
    evaluations = {item["evaluation"]: item["scores"] for item in found if item["stage"] == final}
    evaluations |= {
        f"{item['evaluation']}/{item['stage']}": item["scores"] for item in found if item["stage"] != final
    }
    training, recall = [], []
    for stage in config.training_stages:
        points = read_training_metrics(context.path_in(stage, "metrics.jsonl"), stage)
        training += points[0]
        recall += points[1]
    galleries = []
    for item in evaluations_of(context):
        predictions = context.path_in(
            "retrieval", _folder(item.name, final), f"{item.name}.predictions.jsonl"
        )
        galleries.append(make_gallery(read_retrieval_set(item.folder, item.name), predictions))
    funnel = [
        FunnelStep(
            name,
            config.titles[name],
            RowCounts(step.num_in, step.num_kept, step.dropped),
            {
                source: RowCounts(counts["in"], counts["kept"], counts["dropped"])
                for source, counts in by_source(step).items()
            },
        )
        for name in ("corpus", *STEPS)
        if name in manifests and (name != "corpus" or manifests[name].dropped)
        for step in [manifests[name]]
    ]
    return ReportData(
        title="Chinese CLIP pretraining run",
        summary=f"{manifests['shards'].num_kept:,} image-text pairs from"
        f" {manifests['corpus'].num_in:,} rows, trained in {' → '.join(config.training_stages)},"
        f" scored on {', '.join(sorted(name for name in evaluations if '/' not in name))}.",
        facts={
            "Model": config.model,
            "Training pairs": f"{manifests['shards'].num_kept:,}",
            "Seed": str(context.seed),
            "Final model": f"{final}/model.safetensors",
        },
        final_stage=final,
        evaluations=evaluations,
        baselines=json.loads(store.read_text(context.path_in("baseline", "baselines.json"))),
        stages=tuple(
            StageFacts(name, config.titles[name], step.num_in, step.num_kept, step.dropped)
            for name, step in manifests.items()
        ),
        funnel=tuple(funnel),
        training=tuple(training),
        recall=tuple(recall),
        galleries=tuple(galleries),
        planted=tuple(
            PlantedClass(item.name, item.stage, item.fate, item.planted, item.counted)
            for item in count_planted(context)
        ),
        comparisons=comparisons(config, context),
        histograms=tuple(
            Histogram(name, step, histograms.EDGES[name], counts["kept"], counts["dropped"])
            for step in STEPS
            if step in manifests
            for name, counts in histograms.of_stage(manifests[step].extra.values()).items()
        ),
        notes=tuple(note for step in STEPS if step in manifests for note in threshold_notes(manifests[step])),
    )


def comparisons(config: ReportConfig, context: Context) -> "tuple[Comparison, ...]":
    """The final model beside the paper: evaluation sets named as its protocols, and classification sets."""
    from eval.datasets.retrieval_set import read_retrieval_set
    from eval.evaluate import compare_set
    from eval.paper.comparison import compare_classification
    from eval.paper.published import PAPER_MODELS, retrieval_protocol
    from eval.zeroshot.stage import ZeroshotScores

    final = config.score.stages[-1]
    tables = [
        compare_set(
            read_retrieval_set(item.folder, item.name),
            item.name,
            context.path_in("embed", _folder(item.name, final)),
            setup="finetuned" if final == "finetune" else "zero-shot",
            model=config.model,
            paper_model=PAPER_MODELS.get(config.model),
        )
        for item in evaluations_of(context)
        if retrieval_protocol(item.name) is not None
    ]
    if (manifest := context.parents.get("zeroshot")) is not None:
        found = ZeroshotScores.of(manifest)
        tables += compare_classification(
            found.measured,
            model=config.model,
            paper_model=PAPER_MODELS.get(config.model),
            notes=found.notes,
            differing=found.differing,
        )
    return tuple(tables)
