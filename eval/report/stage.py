"""The stage `report`: a run's numbers on one page."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval.stages import EvaluationConfig, RetrievalFacts, folder_of
from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.evaluation_sets import evaluations_of
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task

if TYPE_CHECKING:
    from eval.paper.comparison import Comparison
    from eval.report.data import ReportData


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """What the report shows besides the numbers."""

    score: EvaluationConfig
    model: str
    training_stages: tuple[str, ...]  # in order, with stages that are not scored
    titles: Mapping[str, str]  # stage → what it does


def plan(config: ReportConfig, context: Context) -> list[Task]:
    """Return one task: it reads every manifest."""
    return [Task("report", {name: digest(manifest.to_json()) for name, manifest in context.parents.items()})]


def run(config: ReportConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `report.html`, `report.json` and `headline.txt`, without times: the same run, the same bytes."""
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
    from eval.report.copies import copies_of_rules
    from eval.report.data import FunnelStep, Histogram, PlantedClass, ReportData, RowCounts, StageFacts
    from eval.report.sources import make_gallery, read_training_metrics

    final = config.score.stages[-1]
    manifests = context.parents
    found = [RetrievalFacts.from_json(extra) for extra in manifests["retrieval"].extra.values()]
    evaluations = {item.evaluation: item.scores for item in found if item.stage == final}
    evaluations |= {f"{item.evaluation}/{item.stage}": item.scores for item in found if item.stage != final}
    training, recall = [], []
    for stage in config.training_stages:
        points = read_training_metrics(context.path_in(stage, "metrics.jsonl"), stage)
        training += points[0]
        recall += points[1]
    galleries = []
    for item in evaluations_of(context):
        predictions = context.path_in(
            "retrieval", folder_of(item.name, final), f"{item.name}.predictions.jsonl"
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
        copies=copies_of_rules(context),
        notes=tuple(note for step in STEPS if step in manifests for note in threshold_notes(manifests[step])),
    )


def comparisons(config: ReportConfig, context: Context) -> "tuple[Comparison, ...]":
    """Compare the final model with the paper: on sets named as its protocols, and on classification sets."""
    from eval.datasets.retrieval_set import read_retrieval_set
    from eval.evaluate import compare_set
    from eval.paper.comparison import compare_classification
    from eval.paper.published import PAPER_MODELS, retrieval_protocol
    from eval.retrieval.measure import StoredFeatures, evaluate_retrieval
    from eval.zeroshot.stage import ZeroshotFacts

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


def stage(config: ReportConfig, *, parents: tuple[str, ...]) -> Stage:
    """Return the stage that writes the report of all stages before it."""
    return Stage(
        "report",
        title="one HTML page and report.json",
        version=4,
        config=config,
        parents=parents,
        plan=plan,
        run=run,
    )
