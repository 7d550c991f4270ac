"""The stage `zeroshot` of a run with `[[classification]]`: its final model on classification sets."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.datasets.labels import labels_for, templates_for
from eval.metrics.bootstrap import Measured
from eval.paper.published import Metric, classification_protocol
from eval.zeroshot.classifier import Ensemble
from pipeline.core import store
from pipeline.core.config import IN_DIGEST_IF_SET, digest
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationSource:
    """`[[classification]]`: a set in any layout of `eval.datasets.classification`."""

    name: str
    """Name of the set. An ICinW name selects metric, labels and templates, and is compared with the paper."""
    folder: str
    """Folder of the set."""
    metric: Metric | None = None
    """Metric. Unset: the set's own in Table 11 of the paper, else accuracy."""
    labels: str | None = None
    """File of Chinese class names. Unset: the folder's `label_cn.txt`, else the built-in labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroshotConfig:
    """`[zeroshot]`: how classes are prompted (paper, 2.1)."""

    ensemble: Ensemble = "features"
    """What is averaged over the templates: text features or scores."""
    templates: str = "own"
    """Templates: `own` (the set's), `general` (80 for any set), `paper` (the paper's, with its labels), or a
    file.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroshotStageConfig:
    """What the stage needs of the run."""

    zeroshot: ZeroshotConfig
    sets: tuple[ClassificationSource, ...]
    stage: str  # training stage of the final model
    vocabulary: str | None  # unset: the vocabulary stage's
    context_length: int  # tokens with [CLS] and [SEP]
    precision: Literal["float32", "bf16"] = field(default="float32", metadata=IN_DIGEST_IF_SET)  # of products


@dataclass(frozen=True, slots=True)
class ZeroshotTask:
    """A task: one classification set."""

    name: str

    def to_json(self) -> dict[str, str]:
        """Return the task's arguments."""
        return {"set": self.name}

    @classmethod
    def from_json(cls, arguments: Mapping[str, Any]) -> "ZeroshotTask":
        """Read a task's arguments."""
        return cls(arguments["set"])


@dataclass(frozen=True, slots=True)
class ZeroshotFacts:
    """What a task notes in its receipt, and in `<set>/scores.json`."""

    name: str
    metric: Metric
    measured: Measured
    by_elevater: Measured | None  # mAP by ELEVATER's rule; None for other metrics
    notes: tuple[str, ...]
    differs: bool  # the set is not the protocol's: no published figure is comparable

    def to_json(self) -> dict[str, Any]:
        """Return the receipt's extra."""
        return {
            "set": self.name,
            "metric": self.metric,
            "measured": asdict(self.measured),
            **({} if self.by_elevater is None else {"by_elevater": asdict(self.by_elevater)}),
            "notes": list(self.notes),
            "differs": self.differs,
        }

    @classmethod
    def from_json(cls, extra: Mapping[str, Any]) -> "ZeroshotFacts":
        """Read a receipt's extra."""
        by_elevater = extra.get("by_elevater")
        return cls(
            extra["set"],
            extra["metric"],
            Measured(**extra["measured"]),
            None if by_elevater is None else Measured(**by_elevater),
            tuple(extra["notes"]),
            extra["differs"],
        )


def plan(config: ZeroshotStageConfig, context: Context) -> list[Task]:
    """Return one task for each set."""
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
                "labels": digest(
                    asdict(labels_for(item.folder, item.name, item.labels, config.zeroshot.templates))
                ),
                **_rules(item),
                "templates": digest(list(templates_for(item.name, config.zeroshot.templates))),
            },
            ZeroshotTask(item.name).to_json(),
        )
        for item in config.sets
    ]


def run(config: ZeroshotStageConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Write `<set>/scores.json`, and `<set>/submission.json` for ELEVATER if the set is one of ICinW."""
    from eval.features.encoder import ModelSource, load_encoder
    from eval.zeroshot.measure import evaluate_classification, open_classification

    item = next(item for item in config.sets if item.name == ZeroshotTask.from_json(task.arguments).name)
    vocabulary = config.vocabulary or context.path_in("vocabulary", "caption.txt")
    weights = context.path_in(config.stage, "model.safetensors")
    source = ModelSource(weights, vocabulary, config.context_length, precision=config.precision)
    encoder = load_encoder(source)
    data, metric = open_classification(
        item.folder,
        name=item.name,
        labels_path=item.labels,
        metric=item.metric,
        templates=config.zeroshot.templates,
    )
    found = evaluate_classification(
        encoder, data, metric, ensemble=config.zeroshot.ensemble, templates=config.zeroshot.templates
    )
    facts = ZeroshotFacts(
        item.name, found.metric, found.measured, found.by_elevater, found.notes, found.differs
    ).to_json()
    outputs = {f"{item.name}/scores.json": found.num_images}
    store.write_text(context.path(item.name, "scores.json"), json.dumps(facts, indent=1, ensure_ascii=False))
    if found.submission is not None:
        outputs[f"{item.name}/submission.json"] = found.num_images
        store.write_text(context.path(item.name, "submission.json"), json.dumps(found.submission))
    return Outcome(outputs, num_in=found.num_images, num_kept=found.num_images, extra=facts)


def _rules(item: ClassificationSource) -> dict[str, str]:
    """Return what only tasks with mAP read: earlier releases measured it by VOC's own rule."""
    protocol = classification_protocol(item.name)
    metric = item.metric or (None if protocol is None else protocol.metric)
    return {"rules": "VOC and ELEVATER"} if metric == "11-point-map" else {}


def _files_digest(folder: str) -> str:
    """Hash the names and sizes of all files below a folder: images are many, and seldom change in place."""
    root = Path(folder)
    return digest(
        sorted(
            (os.path.relpath(path, root), path.stat().st_size) for path in root.rglob("*") if path.is_file()
        )
    )


def stage(config: ZeroshotStageConfig, *, learned: tuple[str, ...]) -> Stage:
    """Return the stage that measures the final model on classification sets.

    `learned` names the vocabulary stage, if the run has one.
    """
    return Stage(
        "zeroshot",
        title="classification sets by the final model",
        version=2,
        config=config,
        parents=(*learned, config.stage),
        plan=plan,
        run=run,
        parallel=False,
    )
