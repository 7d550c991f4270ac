"""The stage `zeroshot` of a run with `[[classification]]`: its final model on classification sets."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from eval.datasets.labels import labels_for, templates_for
from eval.metrics.bootstrap import Measured
from eval.paper.published import Metric
from eval.zeroshot.classifier import Ensemble
from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.records import Manifest
from pipeline.core.stage import Context, Outcome, Progress, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationSource:
    """`[[classification]]`: a set in any layout of `eval.datasets.classification`."""

    name: str  # an id of ICinW chooses metric, labels and templates, and is compared with the paper
    folder: str
    metric: Metric | None = None  # unset: the set's own in Table 11, else accuracy
    labels: str | None = None  # Chinese class names; unset: the folder's label_cn.txt, else ours


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroshotConfig:
    """`[zeroshot]`: how classes are prompted (paper, 2.1)."""

    ensemble: Ensemble = "features"  # what is averaged over templates: text features, or scores
    templates: str = "own"  # own (of the set), general (80 for any set), or a file


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroshotStageConfig:
    """What the stage needs of the run."""

    zeroshot: ZeroshotConfig
    sets: tuple[ClassificationSource, ...]
    stage: str  # training stage of the final model
    vocabulary: str | None  # unset: the vocabulary stage's
    context_length: int  # tokens with [CLS] and [SEP]


def tasks(config: ZeroshotStageConfig, context: Context) -> list[Task]:
    """One task a set."""
    model = context.shards_of(config.stage, "model.safetensors")[0].digest
    learned = {
        shard.path: shard.digest
        for shard in (context.parents["vocabulary"].shards if config.vocabulary is None else ())
        if shard.path == "caption.txt"
    }
    return [
        Task(
            item.name,
            {
                **learned,
                "model": model,
                "set": _files_digest(item.folder),
                "labels": digest(asdict(labels_for(item.folder, item.name, item.labels))),
                "templates": digest(list(templates_for(item.name, config.zeroshot.templates))),
            },
            {"set": item.name},
        )
        for item in config.sets
    ]


def run(config: ZeroshotStageConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """`<set>/scores.json`, and `<set>/submission.json` for ELEVATER where the set is one of ICinW."""
    from eval.features.encoder import ModelSource, load_encoder
    from eval.zeroshot.measure import measure_set

    item = next(item for item in config.sets if item.name == task.arguments["set"])
    vocabulary = config.vocabulary or context.path_in("vocabulary", "caption.txt")
    weights = context.path_in(config.stage, "model.safetensors")
    encoder = load_encoder(ModelSource(weights, vocabulary, config.context_length))
    found = measure_set(
        item.folder,
        encoder,
        name=item.name,
        labels_path=item.labels,
        metric=item.metric,
        ensemble=config.zeroshot.ensemble,
        templates=config.zeroshot.templates,
    )
    facts = {
        "set": item.name,
        "metric": found.metric,
        "measured": asdict(found.measured),
        "notes": list(found.notes),
        "differs": found.differs,
    }
    outputs = {f"{item.name}/scores.json": found.num_images}
    store.write_text(context.path(item.name, "scores.json"), json.dumps(facts, indent=1, ensure_ascii=False))
    if found.submission is not None:
        outputs[f"{item.name}/submission.json"] = found.num_images
        store.write_text(context.path(item.name, "submission.json"), json.dumps(found.submission))
    return Outcome(outputs, num_in=found.num_images, num_kept=found.num_images, extra=facts)


@dataclass(frozen=True, slots=True)
class ZeroshotScores:
    """What the stage's manifest says, by set."""

    measured: dict[str, Measured]
    notes: dict[str, list[str]]
    differing: list[str]

    @classmethod
    def of(cls, manifest: Manifest) -> "ZeroshotScores":
        found = {facts["set"]: facts for facts in manifest.extra.values()}
        return cls(
            {name: Measured(**facts["measured"]) for name, facts in found.items()},
            {name: facts["notes"] for name, facts in found.items()},
            [name for name, facts in found.items() if facts["differs"]],
        )


def _files_digest(folder: str) -> str:
    """Of the names and sizes of all files below a folder: images are many, and seldom change in place."""
    root = Path(folder)
    return digest(
        sorted(
            (os.path.relpath(path, root), path.stat().st_size) for path in root.rglob("*") if path.is_file()
        )
    )
