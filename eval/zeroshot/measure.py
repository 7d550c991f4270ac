"""Classification of a set by a model, from images to the score and its notes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.datasets.classification import ClassificationSet, read_classification
from eval.datasets.labels import templates_for
from eval.features.encoder import EvaluationEncoder
from eval.metrics.bootstrap import Measured
from eval.metrics.classification import measured_elevater_map
from eval.paper.published import Metric, classification_protocol, mismatch
from eval.zeroshot.classifier import Ensemble, class_vectors, classify, submission_record, text_features
from pipeline.core.files.image_files import summary

_SHOWN_NAMES = 3  # of classes that the vocabulary cannot write


@dataclass(frozen=True, slots=True)
class ClassificationResult:
    """One set's score under one model."""

    name: str
    metric: Metric
    measured: Measured  # mAP by VOC's own rule
    by_elevater: Measured | None  # mAP by ELEVATER's rule; None for other metrics
    num_images: int  # scored
    notes: tuple[str, ...]
    differs: bool  # images or classes are not those of the protocol: no published figure is comparable
    submission: dict[str, Any] | None = (
        None  # ELEVATER's record, for a set of ICinW whose images are all there
    )


def open_classification(
    folder: str,
    *,
    name: str | None = None,
    labels_path: str | None = None,
    metric: Metric | None = None,
    templates: str = "own",
) -> tuple[ClassificationSet, Metric]:
    """Read a set in any of the layouts of `eval.datasets.classification`; returns it and its metric.

    `name` (the folder's by default) chooses protocol and labels if it is a set of ICinW; `metric` is that of
    the protocol by default, else accuracy. With the templates `paper` come the labels that the paper quotes.

    Raises:
        InputError: if the set or its labels cannot be read.
    """
    name = name or Path(folder).resolve().name
    protocol = classification_protocol(name)
    metric = metric or ("accuracy" if protocol is None else protocol.metric)
    multi_label = metric == "11-point-map"
    data = read_classification(
        folder, name=name, labels_path=labels_path, multi_label=multi_label, templates=templates
    )
    return data, metric


def unreadable_note(data: ClassificationSet, left_out: Mapping[int, str]) -> str:
    """Return how many images are not scored, and which; `left_out` has their rows and reasons."""
    named = summary((data.images[row].path, reason) for row, reason in left_out.items())
    return f"{data.name}: {len(left_out)} images cannot be decoded and are not scored ({named})"


def evaluate_classification(
    encoder: EvaluationEncoder,
    data: ClassificationSet,
    metric: Metric,
    *,
    ensemble: Ensemble = "features",
    templates: str = "own",
) -> ClassificationResult:
    """Embed and score a set; `templates` is `own` (of the set), `general`, `paper` or a file.

    Raises:
        InputError: if the templates cannot be read, or no image can be decoded.
    """
    name, protocol = data.name, classification_protocol(data.name)
    prompts = templates_for(name, templates)
    vectors_CD = class_vectors(text_features(encoder, data.labels.names, prompts), ensemble)
    left_out = dict[int, str]()
    image_ND, rows_N = encoder.images(data.images, left_out=left_out)
    classified = classify(data, image_ND, rows_N, vectors_CD, metric, num_templates=len(prompts))
    notes, differs, submission = [f"{name}: {note}" for note in data.notes], False, None
    if classified.num_unreadable:
        notes.append(unreadable_note(data, left_out))
    if unknown := encoder.base.tokenizer.with_unknown(data.labels.names):
        some = ", ".join(unknown[:_SHOWN_NAMES]) + (", …" if len(unknown) > _SHOWN_NAMES else "")
        notes.append(
            f"{name}: the vocabulary lacks parts of {len(unknown)} of {len(data.labels.names)} class names"
            f" ({some}), which the model cannot tell apart by them"
        )
    by_elevater = None
    if metric == "11-point-map":
        by_elevater = measured_elevater_map(classified.scores_NC, data.targets_NC[rows_N])
        notes.append(
            f"{name}: 11-point mAP by VOC's own rule is {classified.measured.value:.1f}, by ELEVATER's, from"
            f" which the paper's figure comes, {by_elevater.value:.1f}: it ranks by a softmax over classes"
            " and counts precision 1 at recall 0"
        )
    if protocol is not None:
        found = (
            mismatch(name, "images", protocol.images, classified.num_images),
            mismatch(name, "classes", protocol.classes, len(data.labels.names)),
        )
        notes += [note for note in found if note]
        differs = any(found)
        if not classified.num_unreadable:
            submission = submission_record(data, classified, encoder)
    else:
        notes.append(f"{name}: {classified.num_images:,} images of {len(data.labels.names):,} classes")
    return ClassificationResult(
        name,
        metric,
        classified.measured,
        by_elevater,
        classified.num_images,
        tuple(notes),
        differs,
        submission,
    )
