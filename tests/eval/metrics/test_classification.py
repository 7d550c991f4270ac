"""Metrics of Table 11 against scikit-learn and VOC's own loop, on random cases with ties."""

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_recall_curve, roc_auc_score

from eval.metrics.bootstrap import recall_intervals
from eval.metrics.classification import (
    average_precision_11,
    elevater_map,
    measured_elevater_map,
    measured_metric,
)


def random_case(
    seed: int, *, num_classes: int, ties: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    num_images = int(rng.integers(20, 200))
    target_N = rng.integers(num_classes, size=num_images)
    target_N[: min(2, num_classes)] = np.arange(min(2, num_classes))
    scores_NC = rng.normal(size=(num_images, num_classes)) + np.eye(num_classes)[target_N]
    return (scores_NC.round(1) if ties else scores_NC), target_N


@pytest.mark.parametrize("seed", range(20))
def test_accuracy_and_mean_per_class(seed: int) -> None:
    scores_NC, target_N = random_case(seed, num_classes=7, ties=seed % 2 == 0)
    targets_NC = np.eye(7, dtype=bool)[target_N]
    predicted_N = scores_NC.argmax(axis=1)
    assert measured_metric("accuracy", scores_NC, targets_NC).value == pytest.approx(
        100 * accuracy_score(target_N, predicted_N)
    )
    assert measured_metric("mean-per-class", scores_NC, targets_NC).value == pytest.approx(
        100 * balanced_accuracy_score(target_N, predicted_N)
    )


@pytest.mark.parametrize("seed", range(20))
def test_roc_auc(seed: int) -> None:
    scores_NC, target_N = random_case(seed, num_classes=2, ties=seed % 2 == 0)
    margin_N = scores_NC[:, 1] - scores_NC[:, 0]
    found = measured_metric("roc-auc", scores_NC, np.eye(2, dtype=bool)[target_N]).value
    assert found == pytest.approx(100 * roc_auc_score(target_N, margin_N))


def voc_devkit(score_N: npt.NDArray[np.float64], positive_N: npt.NDArray[np.bool_]) -> float:
    """VOCevalcls of the 2007 development kit, line by line."""
    order = np.argsort(-score_N)
    tp, fp = np.cumsum(positive_N[order]), np.cumsum(~positive_N[order])
    rec, prec = tp / positive_N.sum(), tp / (fp + tp)
    ap = 0.0
    for t in range(11):
        p = prec[rec >= t / 10]
        ap += (p.max() if len(p) else 0.0) / 11
    return ap


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_is_voc_s(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positive_N = rng.random(80) < 0.2
    positive_N[:10] = True  # ten or more, so that recall levels fall on counts
    score_N = rng.normal(size=80) + positive_N
    assert average_precision_11(score_N, positive_N) == pytest.approx(voc_devkit(score_N, positive_N))


@pytest.mark.parametrize("seed", range(10))
def test_average_precision_with_ties_follows_scikit_learn_s_curve(seed: int) -> None:
    """There equal scores are one threshold; its last point, (1, 0), is artificial."""
    rng = np.random.default_rng(seed)
    positive_N = rng.random(60) < 0.3
    positive_N[0] = True
    score_N = (rng.normal(size=60) + positive_N).round(0)
    precision, recall, _ = precision_recall_curve(positive_N, score_N)
    precision, recall = precision[:-1], recall[:-1]
    expected = np.mean([precision[recall >= level - 1e-12].max() for level in np.linspace(0, 1, 11)])
    assert average_precision_11(score_N, positive_N) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(10))
def test_elevater_s_variant_takes_scikit_learn_s_curve_as_it_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets_NC = rng.random((60, 3)) < 0.3
    targets_NC[0] = True
    scores_NC = (rng.normal(size=(60, 3)) + 0.3 * targets_NC) / 20
    chance_NC = np.exp(100 * scores_NC)  # clip_zeroshot_evaluator.py
    chance_NC /= chance_NC.sum(axis=1, keepdims=True)
    means = []
    for column in range(3):
        precision, recall, _ = precision_recall_curve(targets_NC[:, column], chance_NC[:, column])
        means.append(np.mean([precision[recall >= level - 1e-12].max() for level in np.linspace(0, 1, 11)]))
    found = elevater_map(scores_NC, targets_NC)
    assert found == pytest.approx(100 * np.mean(means))
    assert found != pytest.approx(measured_metric("11-point-map", scores_NC, targets_NC).value)
    measured = measured_elevater_map(scores_NC, targets_NC)
    assert measured.value == found
    assert measured.low < found < measured.high


def test_several_right_classes_only_where_the_metric_takes_them() -> None:
    targets_NC = np.array([[True, True], [False, True]])
    scores_NC = np.array([[0.1, 0.2], [0.3, 0.4]])
    assert measured_metric("11-point-map", scores_NC, targets_NC).value > 0
    with pytest.raises(ValueError, match="exactly one right class"):
        measured_metric("accuracy", scores_NC, targets_NC)
    with pytest.raises(ValueError, match="NaN"):
        measured_metric("11-point-map", scores_NC * np.nan, targets_NC)


@pytest.mark.parametrize("metric", ["accuracy", "mean-per-class", "roc-auc", "11-point-map"])
def test_intervals_hold_the_value_and_narrow_with_more_images(metric: str) -> None:
    rng = np.random.default_rng(3)
    target_N = rng.integers(2, size=2000)
    scores_NC = rng.normal(size=(2000, 2)) + np.eye(2)[target_N]
    targets_NC = np.eye(2, dtype=bool)[target_N]
    few = measured_metric(metric, scores_NC[:100], targets_NC[:100])  # type: ignore[arg-type]
    many = measured_metric(metric, scores_NC, targets_NC)  # type: ignore[arg-type]
    for found in (few, many):
        assert found.low < found.value < found.high
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_recall_intervals_match_the_binomial() -> None:
    ranks = np.where(np.arange(5000) % 10 < 3, 1, 20)  # 30 %
    found = recall_intervals(ranks, ranks[:1000])
    assert found["t2i/r1"].value == 30.0
    deviation = 100 * (0.3 * 0.7 / 5000) ** 0.5
    assert found["t2i/r1"].low == pytest.approx(30 - 1.96 * deviation, abs=0.15)
    assert found["t2i/r1"].high == pytest.approx(30 + 1.96 * deviation, abs=0.15)
    assert found["mean_recall"].value == 30.0
    wide = found["i2t/r1"].high - found["i2t/r1"].low
    assert wide > 1.8 * (found["t2i/r1"].high - found["t2i/r1"].low)
