"""Writes a model's folder for a hub: weights that load by name, and a card with scores as metadata."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eval.paper.published import Metric
from pipeline.core import store
from pipeline.core.files.foreign import foreign, parse_json
from pipeline.core.records import InputError
from pipeline.publish.corpus import data_section, manifest_of, settings

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_DIRECTIONS = {"t2i": "text to image", "i2t": "image to text"}
_RECALLS = {"r1": "Recall@1", "r5": "Recall@5", "r10": "Recall@10"}
_ZEROSHOT_METRICS: Mapping[Metric, str] = {
    "accuracy": "accuracy",
    "mean-per-class": "mean accuracy of the classes",
    "roc-auc": "ROC AUC",
    "11-point-map": "11-point mean average precision",
}
_STARTS = ("start_weights", "image_weights", "text_weights")


def write_model(
    weights: str, vocabulary: str | None, folder: str, *, repo: str, licence: str, base: str | None
) -> list[str]:
    """Write a model's folder as transformers loads it; a ResNet's has the code for that in it.

    `weights` is a path; base model, data and scores come from the run's folder above it. Return lines that
    describe the written files.

    Raises:
        InputError: if the weights cannot be read.
    """
    from huggingface_hub import ModelCardData

    from training.weights.convert import convert
    from training.weights.model_card import FOLDER

    lines = convert(weights, folder, to="hugging_face", vocabulary=vocabulary)
    run_folder = run_folder_of(weights)
    path = store.join(folder, "README.md")
    text = store.read_text(path)
    name = repo.partition("/")[2]
    stage = os.path.basename(os.path.dirname(os.path.abspath(weights)))
    results = []
    if run_folder is not None:
        results = [*scores(run_folder, stage), *zeroshot_scores(run_folder, stage)]
    bases = [base] if base is not None else base_models(run_folder)
    data = ModelCardData(
        language="zh",
        license=licence,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "chinese-clip"],
        base_model=bases or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    body = text.split("---\n", 2)[2].replace(f"({FOLDER}", f'("{repo}"')  # without the card's own metadata
    section = "" if run_folder is None else data_section(run_folder)
    store.write_text(path, f"---\n{data.to_yaml()}\n---\n{body.rstrip()}\n{section}")
    return [*lines, f"README.md: {licence}, base model {', '.join(bases) or 'none'}, {len(results)} scores"]


def run_folder_of(weights: str) -> str | None:
    """Return the folder of the run that trained the weights, or None."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(weights)))
    return folder if settings(folder) else None


def base_models(run_folder: str | None) -> list[str]:
    """Return the hub ids of the weights that a run started from."""
    from training.weights.hub.names import find_id

    model = {} if run_folder is None else settings(run_folder).get("model", {})
    found = []
    for text in (model[key] for key in _STARTS if isinstance(model.get(key), str)):
        try:
            wanted = find_id(text)
        except InputError:
            continue  # a file that existed before the run
        if wanted is not None:
            found.append(wanted.repo)
    return found


def scores(run_folder: str, stage: str) -> "list[EvalResult]":
    """Return the retrieval scores of a stage's model, in percent, as a run's report holds them."""
    from huggingface_hub import EvalResult

    path = os.path.join(run_folder, "report", "report.json")
    if not os.path.isfile(path):
        return []
    with foreign(path, "run's report", "make it again with --stage report --redo"):
        found: Mapping[str, Any] = parse_json(store.read_bytes(path)).get("evaluations", {})
        own = {name: value for name, value in found.items() if name.endswith(f"/{stage}")}
        final = {name: value for name, value in found.items() if "/" not in name}
        return [
            EvalResult(
                task_type="image-text-retrieval",
                task_name="Image-text retrieval",
                dataset_type=name.partition("/")[0],
                dataset_name=name.partition("/")[0],
                metric_type=f"{way}_{recall}",
                metric_name=f"{metric}, {label}",
                metric_value=round(float(value[way][recall]), 2),
            )
            for name, value in (own or final).items()
            for way, label in _DIRECTIONS.items()
            for recall, metric in _RECALLS.items()
            if recall in value.get(way, {})
        ]


def zeroshot_scores(run_folder: str, stage: str) -> "list[EvalResult]":
    """Return the zero-shot scores of a stage's model on classification sets, in percent.

    They are those of the run's stage `zeroshot`, which measures the final model only: none for another stage.
    """
    from huggingface_hub import EvalResult

    from eval.zeroshot.stage import ZeroshotFacts

    measured = manifest_of(run_folder, "zeroshot")
    if measured is None or stage not in measured.parents:
        return []
    path = os.path.join(run_folder, "zeroshot", "manifest.json")
    with foreign(path, "manifest", "make it again with --stage zeroshot --redo"):
        found = [ZeroshotFacts.from_json(extra) for extra in measured.extra.values()]
    return [
        EvalResult(
            task_type="zero-shot-image-classification",
            task_name="Zero-shot image classification",
            dataset_type=facts.name,
            dataset_name=facts.name,
            metric_type=facts.metric,
            metric_name=_ZEROSHOT_METRICS[facts.metric],
            metric_value=round(facts.measured.value, 2),
        )
        for facts in found
    ]
