"""The metrics of Table 11: accuracy, mean per class, ROC AUC, 11-point mean average precision; in percent.

11-point mAP is only for VOC-2007, by two rules. `mean_average_precision_11` is VOC's own definition,
which is what its name says and what other programs can be compared with. `elevater_map` is that of ELEVATER's
toolkit, from which the paper's figure comes: a softmax over the classes ranks the images of a class, and the
curve begins with precision 1 at recall 0. Only the latter is compared with the paper.

Scores are [N, C], higher is better. Of equal scores the lower class is predicted.
"""

import numpy as np
import numpy.typing as npt

from eval.metrics.bootstrap import NUM_RESAMPLES, Measured, metric_interval
from eval.paper.published import Metric
from pipeline.core.arrays import BoolArray, Float64Array, Int64Array

FloatArray = npt.NDArray[np.floating]

_RECALL_LEVELS = np.linspace(0, 1, 11)
_RESAMPLES_OF_MAP = 200  # sorts 20 classes each time
_ELEVATER_SCALE = 100.0  # of the cosines in ELEVATER's softmax, for any factor of the model


def measured_metric(metric: Metric, scores_NC: FloatArray, targets_NC: BoolArray) -> Measured:
    """Return one metric in percent with its bootstrap interval over images.

    `targets_NC` marks the right classes, exactly one a row except for 11-point mAP.

    Raises:
        ValueError: for rows without or with several right classes if the metric takes one, for ROC AUC of
            other than two classes, and for NaN.
    """
    _check(metric, scores_NC, targets_NC)
    num_images, num_classes = scores_NC.shape
    if metric == "11-point-map":
        return metric_interval(
            lambda rows: 100 * mean_average_precision_11(scores_NC[rows], targets_NC[rows]),
            num_images,
            num_resamples=_RESAMPLES_OF_MAP,
        )
    if metric == "roc-auc":
        margin_N, positive_N = scores_NC[:, 1] - scores_NC[:, 0], targets_NC[:, 1]
        return metric_interval(lambda rows: 100 * roc_auc(margin_N[rows], positive_N[rows]), num_images)
    target_N = targets_NC.argmax(axis=1)
    right_N = scores_NC.argmax(axis=1) == target_N
    if metric == "accuracy":
        return metric_interval(lambda rows: float(100 * right_N[rows].mean()), num_images)
    return metric_interval(
        lambda rows: 100 * mean_per_class(right_N[rows], target_N[rows], num_classes),
        num_images,
        num_resamples=NUM_RESAMPLES,
    )


def measured_elevater_map(scores_NC: FloatArray, targets_NC: BoolArray) -> Measured:
    """Return `elevater_map` with its bootstrap interval over images."""
    _check("11-point-map", scores_NC, targets_NC)
    return metric_interval(
        lambda rows: elevater_map(scores_NC[rows], targets_NC[rows]),
        len(scores_NC),
        num_resamples=_RESAMPLES_OF_MAP,
    )


def softmax(logits_NC: FloatArray) -> Float64Array:
    """Return probabilities over classes in float64; rows sum to 1."""
    exponentials_NC = np.exp(logits_NC.astype(np.float64) - logits_NC.max(axis=1, keepdims=True))
    found: Float64Array = exponentials_NC / exponentials_NC.sum(axis=1, keepdims=True)
    return found


def mean_per_class(right_N: BoolArray, target_N: Int64Array, num_classes: int) -> float:
    """Return the mean over the classes that occur of the share that is right.

    This is scikit-learn's balanced accuracy.
    """
    counts = np.bincount(target_N, minlength=num_classes)
    hits = np.bincount(target_N[right_N], minlength=num_classes)
    occurs = counts > 0
    return float((hits[occurs] / counts[occurs]).mean())


def roc_auc(score_N: FloatArray, positive_N: BoolArray) -> float:
    """Return the probability that a positive scores higher than a negative; a tie counts half.

    It is nan without both.
    """
    num_positive = int(np.count_nonzero(positive_N))
    num_negative = len(positive_N) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    _, level_N, counts = np.unique(score_N, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = mean_rank[level_N][positive_N].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def average_precision_11(score_N: FloatArray, positive_N: BoolArray) -> float:
    """Return VOC 2007's average precision (Everingham et al. 2010, section 4.2); nan without a positive.

    The mean over recall levels 0, 0.1 … 1 of the highest precision at that recall or above. Equal scores come
    in together, so that their order does not matter.
    """
    levels = _precision_at_levels(score_N, positive_N)
    return float("nan") if levels is None else float(levels.mean())


def elevater_map(scores_NC: FloatArray, targets_NC: BoolArray) -> float:
    """Return the 11-point mAP of ELEVATER's toolkit, percent; VOC-2007's published figures come from it.

    `scores_NC` are cosines. ELEVATER ranks by their softmax over the classes, times 100
    (clip_zeroshot_evaluator.py), and takes scikit-learn's precision-recall curve with its artificial point,
    precision 1 at recall 0, so that the first of the 11 levels is always 1
    (MeanAveragePrecisionNPointsEvaluator of vision-evaluation).
    """
    chance_NC = softmax(scores_NC.astype(np.float64) * _ELEVATER_SCALE)
    found = [_precision_at_levels(chance_NC[:, c], targets_NC[:, c]) for c in range(scores_NC.shape[1])]
    means = [(levels[1:].sum() + 1) / len(levels) for levels in found if levels is not None]
    return 100 * float(np.mean(means)) if means else float("nan")


def _precision_at_levels(score_N: FloatArray, positive_N: BoolArray) -> FloatArray | None:
    """Return the highest precision at each of the 11 recall levels or above; None without a positive."""
    num_positive = int(np.count_nonzero(positive_N))
    if not num_positive:
        return None
    order = np.argsort(-score_N, kind="stable")
    ordered = score_N[order]
    last_of_equals = np.append(ordered[1:] != ordered[:-1], True)
    hits = np.cumsum(positive_N[order])[last_of_equals]
    recall = hits / num_positive
    precision = hits / (np.flatnonzero(last_of_equals) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    # 3 of 10 meet the level 0.3, though 3/10 and linspace's 0.3 differ in the last bit
    first = np.searchsorted(recall, _RECALL_LEVELS - 1e-12)
    levels: FloatArray = best_from_here[first]
    return levels


def mean_average_precision_11(scores_NC: FloatArray, targets_NC: BoolArray) -> float:
    """Return the mean of `average_precision_11` over classes that have a positive; nan if none has."""
    found = [average_precision_11(scores_NC[:, c], targets_NC[:, c]) for c in range(scores_NC.shape[1])]
    defined = [value for value in found if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


def _check(metric: Metric, scores_NC: FloatArray, targets_NC: BoolArray) -> None:
    if scores_NC.shape != targets_NC.shape or 0 in scores_NC.shape:
        raise ValueError(f"scores {list(scores_NC.shape)} and targets {list(targets_NC.shape)} do not fit")
    if not np.isfinite(scores_NC).all():
        raise ValueError("scores are NaN or infinite")
    if metric == "roc-auc" and scores_NC.shape[1] != 2:
        raise ValueError(f"ROC AUC is of two classes, not {scores_NC.shape[1]}")
    if metric != "11-point-map" and (targets_NC.sum(axis=1) != 1).any():
        raise ValueError(f"{metric} takes exactly one right class an image")
