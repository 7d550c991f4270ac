"""Collects what the report shows from a run's stages: all of them, or those that have run so far."""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, TypeVar

from data_prep.accounting import histograms
from data_prep.accounting.funnel import STEPS, by_source, count_planted, no_op_thresholds
from data_prep.concepts import stages as concepts
from eval.datasets.retrieval_set import read_retrieval_set
from eval.report.copies import copies_of_rules
from eval.report.data import (
    ConceptRow,
    Concepts,
    ExampleGallery,
    FunnelStep,
    Histogram,
    PlantedClass,
    RecallPoint,
    ReportData,
    RowCounts,
    StageFacts,
    TrainingPoint,
)
from eval.report.dropped import dropped_by_rules
from eval.report.lookup import RowLookup
from eval.report.samples import corpus_map, wall_of_samples
from eval.report.sources import make_gallery, read_training_metrics
from eval.stages import ReportConfig, RetrievalFacts, folder_of
from pipeline.core import store
from pipeline.core.evaluation_sets import evaluations_of
from pipeline.core.records import InputError, Manifest
from pipeline.core.stage import Context

if TYPE_CHECKING:
    from eval.metrics.recall import RetrievalScores
    from eval.paper.comparison import Comparison

Part = TypeVar("Part")

MAX_GALLERIES = 6  # evaluation sets with examples
# The stages that decide the fate of planted rows.
_COUNTED = {"corpus", "filter_text", "dedup", "download", "filter_image", "shards"}


def collect(
    config: ReportConfig,
    context: Context,
    finished: Collection[str] | None = None,
    *,
    with_images: bool = True,
    lenient: bool = False,
) -> ReportData:
    """Return what the page shows of the stages in `context.parents`.

    `finished` names those that are complete (default: all); the others have the receipts so far. Without
    `images`, the page has no examples of rows and answers, and no tables of the paper, which need features.
    A `lenient` page leaves out parts whose files are gone and says so.

    Raises:
        InputError: if a file is missing or damaged, unless `lenient`.
    """
    manifests = context.parents
    finished = manifests if finished is None else finished
    final, evaluations = _scores(config, context)
    training, recall = _curves(config, context)
    pairs = manifests.get("shards")
    data = ReportData(
        model=config.model,
        training_stages=config.training_stages,
        facts={
            **({"model": config.model} if config.model else {}),
            **({"pairs": f"{pairs.num_kept:,}"} if pairs else {}),
            "seed": str(context.seed),
            **({"final": f"{config.score.stages[-1]}/model.safetensors"} if config.score else {}),
        },
        final_stage=final,
        evaluations=evaluations,
        baselines=(
            json.loads(store.read_text(context.path_in("baseline", "baselines.json")))
            if "baseline" in finished
            else {}
        ),
        stages=tuple(
            StageFacts(name, config.titles[name], step.num_in, step.num_kept, step.dropped)
            for name, step in manifests.items()
        ),
        funnel=_funnel(config, context),
        training=training,
        recall=recall,
        galleries=(),
        planted=(),
        histograms=tuple(
            Histogram(name, step, histograms.EDGES[name], counts["kept"], counts["dropped"])
            for step in STEPS
            if step in manifests
            for name, counts in histograms.of_stage(manifests[step].extra.values()).items()
        ),
        notes=tuple(
            note for step in STEPS if step in manifests for note in no_op_thresholds(manifests[step])
        ),
        concepts=_concepts(manifests) if "count_concepts" in finished else None,
    )
    return _with_images(data, config, context, finished, lenient) if with_images else data


def _concepts(manifests: Mapping[str, Manifest]) -> Concepts:
    counted = concepts.facts_of(manifests["count_concepts"])
    kept = concepts.kept_of(manifests["balance"]) if "balance" in manifests else None
    return Concepts(
        counted.entries,
        counted.found,
        counted.captions,
        counted.matched,
        tuple(
            ConceptRow(entry, rows, kept[entry] if kept is not None else None)
            for entry, rows in counted.top.items()
        ),
    )


def _with_images(
    data: ReportData, config: ReportConfig, context: Context, finished: Collection[str], lenient: bool
) -> ReportData:
    """Add what tables, images and features provide, reading a bounded part of each."""
    missing: list[str] = []

    def attempt(part: Callable[[], Part]) -> Part | None:
        try:
            return part()
        except InputError as error:
            if not lenient:
                raise
            missing.append(str(error))
            return None

    # A run that is training needs its accelerator: the model is loaded when the training has ended.
    score = config.score
    has_model = score is not None and {*finished} >= {score.stages[-1], "shards", "retrieval"}
    with RowLookup(context) as lookup:
        copies = attempt(lambda: copies_of_rules(context, lookup)) or ()
        dropped = attempt(lambda: dropped_by_rules(context, lookup)) or ()
    planted = attempt(lambda: count_planted(context)) if {*finished} >= _COUNTED else None
    galleries = attempt(lambda: _galleries(context, data.final_stage)) if "retrieval" in finished else None
    shown = dataclasses.replace(
        data,
        galleries=galleries or (),
        planted=tuple(
            PlantedClass(item.name, item.stage, item.fate, item.planted, item.counted)
            for item in planted or ()
        ),
        comparisons=(attempt(lambda: comparisons(config, context)) if "embed" in finished else None) or (),
        copies=copies,
        samples=(attempt(lambda: wall_of_samples(context)) if "shards" in context.parents else None) or (),
        dropped=dropped,
        corpus_map=attempt(lambda: corpus_map(context, score)) if score and has_model else None,
    )
    return dataclasses.replace(shown, missing=tuple(dict.fromkeys(missing)))


def _scores(config: ReportConfig, context: Context) -> "tuple[str, dict[str, RetrievalScores]]":
    """Return the last scored stage, and the scores: its own under the sets' names, others with `/stage`."""
    if config.score is None:
        return "", {}
    manifest = context.parents.get("retrieval")
    found = [RetrievalFacts.from_json(extra) for extra in (manifest.extra if manifest else {}).values()]
    scored = {item.stage for item in found}
    final = next((name for name in reversed(config.score.stages) if name in scored), config.score.stages[-1])
    evaluations = {item.evaluation: item.scores for item in found if item.stage == final}
    # If the stage is unfinished, some sets may lack the last model; they appear with the next call.
    evaluations |= {
        f"{item.evaluation}/{item.stage}": item.scores
        for item in found
        if item.stage != final and item.evaluation in evaluations
    }
    return final, evaluations


def _curves(
    config: ReportConfig, context: Context
) -> tuple[tuple[TrainingPoint, ...], tuple[RecallPoint, ...]]:
    training, recall = list[TrainingPoint](), list[RecallPoint]()
    for stage in config.training_stages:
        path = context.path_in(stage, "metrics.jsonl")
        if stage in context.parents or store.exists(path):
            points = read_training_metrics(path, stage)
            training += points[0]
            recall += points[1]
    return tuple(training), tuple(recall)


def _galleries(context: Context, final: str) -> tuple[ExampleGallery, ...]:
    galleries = []
    for item in list(evaluations_of(context))[:MAX_GALLERIES]:
        folder = folder_of(item.name, final)
        texts, images = (
            context.path_in("retrieval", folder, f"{item.name}.{kind}")
            for kind in ("predictions.jsonl", "tr.predictions.jsonl")
        )
        evaluation = read_retrieval_set(item.folder, item.name)
        galleries.append(make_gallery(evaluation, texts, images if evaluation.image_to_text else None))
    return tuple(galleries)


def _funnel(config: ReportConfig, context: Context) -> tuple[FunnelStep, ...]:
    return tuple(
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
        if name in context.parents and (name != "corpus" or context.parents[name].dropped)
        for step in [context.parents[name]]
    )


def comparisons(config: ReportConfig, context: Context) -> "tuple[Comparison, ...]":
    """Compare the final model with the paper on classification sets and on sets named after its protocols."""
    from eval.datasets.retrieval_set import read_retrieval_set
    from eval.evaluate import compare_set
    from eval.paper.comparison import compare_classification
    from eval.paper.published import PAPER_MODELS, retrieval_protocol
    from eval.retrieval.measure import StoredFeatures, evaluate_retrieval
    from eval.zeroshot.stage import ZeroshotFacts

    if config.score is None or config.model is None:
        return ()
    final = config.score.stages[-1]
    tables = []
    for item in evaluations_of(context):
        if retrieval_protocol(item.name) is None:
            continue
        evaluation = read_retrieval_set(item.folder, item.name)
        features = StoredFeatures(context.path_in("embed", folder_of(item.name, final)))
        tables.append(
            compare_set(
                evaluation,
                item.name,
                evaluate_retrieval(features, evaluation),
                setup="finetuned" if final == "finetune" else "zero-shot",
                model=config.model,
                paper_model=PAPER_MODELS.get(config.model),
            )
        )
    if (manifest := context.parents.get("zeroshot")) is not None:
        found = [ZeroshotFacts.from_json(extra) for extra in manifest.extra.values()]
        tables += compare_classification(
            {item.name: item.measured for item in found},
            model=config.model,
            paper_model=PAPER_MODELS.get(config.model),
            notes={item.name: item.notes for item in found},
            differing=[item.name for item in found if item.differs],
            by_elevater={item.name: item.by_elevater for item in found if item.by_elevater is not None},
        )
    return tuple(tables)
