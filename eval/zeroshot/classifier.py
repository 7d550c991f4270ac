"""Zero-shot classification with an ensemble of prompts (section 2.1), and ELEVATER's submission files.

The text side is computed once: a class becomes one vector, and the images meet C vectors, not C × T.
Two ways to fold T templates into one vector, both offered:

- `features`: the mean of the text features, brought back to unit length. What OpenAI's and Chinese-CLIP's
  code does, and the default.
- `scores`: the mean of the scores, as section 2.1 of the paper words it. A mean of cosines is the cosine with
  the mean vector left at its length, so this is one vector as well.
"""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eval.datasets.classification import ClassificationSet
from eval.datasets.labels import prompts
from eval.features.encoder import EvaluationEncoder
from eval.metrics.bootstrap import Measured
from eval.metrics.classification import measured_metric, softmax
from eval.paper.published import Metric
from pipeline.core import store
from pipeline.core.arrays import Float32Array, Float64Array, Int64Array
from pipeline.core.records import InputError

Ensemble = Literal["features", "scores"]

_DECIMALS = 6  # of ELEVATER's probabilities
_SUM_TOLERANCE = 1e-3  # of ELEVATER's checker


def text_features(encoder: EvaluationEncoder, names: Sequence[str], templates: Sequence[str]) -> Float32Array:
    """Return unit-norm features of every class in every template, [C, T, D]."""
    flat = encoder.texts(prompts(names, templates))
    return flat.reshape(len(names), len(templates), -1)


def class_vectors(text_CTD: Float32Array, ensemble: Ensemble) -> Float32Array:
    """Return one vector a class, [C, D].

    Raises:
        InputError: if templates cancel out to a zero vector.
    """
    mean_CD: Float32Array = text_CTD.mean(axis=1, dtype=np.float64).astype(np.float32)
    if ensemble == "scores":
        return mean_CD
    length_C1 = np.linalg.norm(mean_CD, axis=1, keepdims=True)
    if not length_C1.all():
        raise InputError("the text features of a class cancel out to zero; use other templates")
    unit_CD: Float32Array = mean_CD / length_C1
    return unit_CD


def scores_of(image_ND: Float32Array, vectors_CD: Float32Array) -> Float32Array:
    """Score of each class for each image, [N, C]: a cosine, or a mean of cosines."""
    return image_ND @ vectors_CD.T


def probabilities(scores_NC: Float32Array, logit_scale: float) -> Float64Array:
    """Return the softmax over classes in float64; rows sum to 1."""
    return softmax(scores_NC.astype(np.float64) * logit_scale)


@dataclass(frozen=True, slots=True)
class Classified:
    """One set under one model, and what is needed to look further."""

    name: str
    metric: Metric
    measured: Measured
    num_images: int  # scored
    num_unreadable: int  # images that cannot be decoded; they are not scored
    num_templates: int
    scores_NC: Float32Array
    rows_N: Int64Array  # rows of the set that were scored


def measure_scores(
    data: ClassificationSet, metric: Metric, scores_NC: Float32Array, rows_N: Int64Array
) -> Measured:
    """Return the metric of scores for the set's images `rows_N`.

    Raises:
        InputError: if the metric does not apply to the set; it names the set.
    """
    try:
        return measured_metric(metric, scores_NC, data.targets_NC[rows_N])
    except ValueError as error:
        raise InputError(f"{data.name}: {error}") from None


def classify(
    data: ClassificationSet,
    image_ND: Float32Array,
    rows_N: Int64Array,
    vectors_CD: Float32Array,
    metric: Metric,
    *,
    num_templates: int,
) -> Classified:
    """Score a set from features; `rows_N` are the rows of the set that `image_ND` belongs to."""
    scores_NC = scores_of(image_ND, vectors_CD)
    measured = measure_scores(data, metric, scores_NC, rows_N)
    return Classified(
        data.name,
        metric,
        measured,
        len(rows_N),
        data.num_images - len(rows_N),
        num_templates,
        scores_NC,
        rows_N,
    )


def submission_record(
    data: ClassificationSet, classified: Classified, encoder: EvaluationEncoder, *, seed: int = 0
) -> dict[str, Any]:
    """Return ELEVATER's record of one set: probabilities [1, N, C] with 6 decimals, as in `index.json`.

    Raises:
        InputError: if images are missing: the leaderboard counts them.
    """
    if classified.num_unreadable:
        raise InputError(
            f"{data.name}: {classified.num_unreadable} images cannot be decoded: no predictions for them,"
            " so no submission; fetch the set again"
        )
    chance_NC = probabilities(classified.scores_NC, encoder.logit_scale)
    if data.submission_order is not None:
        chance_NC = chance_NC[data.submission_order]
    num_parameters, num_visual = encoder.num_parameters()
    return {
        "model_name": f"CN-CLIP-{encoder.name}",
        "dataset_name": data.name,
        "num_trainable_params": 0,
        "num_params": num_parameters,
        "num_visual_params": num_visual,
        "num_backbone_params": num_parameters,
        "n_shot": 0,
        "rnd_seeds": [seed],
        "predictions": [chance_NC.round(_DECIMALS).tolist()],
    }


def write_submission(path: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the zip for ELEVATER's leaderboard: `all_predictions.json` with `{"data": [...]}`.

    The same records give the same bytes.

    Raises:
        InputError: for what its checker refuses: a set twice, probabilities outside [0, 1], a row of a set
            that does not sum to 1 (± 1e-3).
    """
    names = [record["dataset_name"] for record in records]
    if len(set(names)) != len(names) or not names:
        raise InputError(f"{path}: a submission needs each set once, found {', '.join(names) or 'none'}")
    for record in records:
        predictions = np.array(record["predictions"])
        if predictions.ndim != 3 or not ((predictions >= 0) & (predictions <= 1)).all():
            raise InputError(
                f"{path}: {record['dataset_name']}: predictions must be [1, N, C] within 0 and 1"
            )
        if (np.abs(predictions.sum(axis=2) - 1) > _SUM_TOLERANCE).any():
            raise InputError(f"{path}: {record['dataset_name']}: a row of predictions does not sum to 1")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo("all_predictions.json", date_time=(1980, 1, 1, 0, 0, 0))
        entry.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(entry, json.dumps({"data": list(records)}))
    store.write_bytes(path, buffer.getvalue())
