"""Bootstrap intervals: how far a score would move had other queries or images been drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics.recall import CUTOFFS, recall_at_k, retrieval_scores
from pipeline.core.arrays import Float64Array, Int64Array

NUM_RESAMPLES = 1000
_BLOCK_ELEMENTS = 1 << 22  # resampled rows held at once


@dataclass(frozen=True, slots=True)
class Measured:
    """A score in percent with its 95% interval (2.5th and 97.5th percentile of the resamples)."""

    value: float
    low: float
    high: float


def recall_intervals(
    t2i_ranks: Int64Array, i2t_ranks: Int64Array | None, seed: int = 0
) -> dict[str, Measured]:
    """Return R@1, 5, 10 of each direction and mean recall, queries resampled with replacement.

    Keys `t2i/r1` … `i2t/r10`, `mean_recall`. The two directions are resampled apart from each other.
    """
    rng = np.random.default_rng(seed)
    scores = retrieval_scores(recall_at_k(t2i_ranks), None if i2t_ranks is None else recall_at_k(i2t_ranks))
    values, resampled = dict[str, float](), dict[str, Float64Array]()
    for name, ranks in (("t2i", t2i_ranks), ("i2t", i2t_ranks)):
        if ranks is None:
            continue
        hits_QK = (ranks[:, None] <= np.array(CUTOFFS)) * 100.0
        recall = scores["t2i"] if name == "t2i" else scores["i2t"]
        assert recall is not None
        values |= {f"{name}/r1": recall["r1"], f"{name}/r5": recall["r5"], f"{name}/r10": recall["r10"]}
        means_RK = _resampled_means(hits_QK.astype(np.float64), rng)
        for column, cutoff in enumerate(CUTOFFS):
            resampled[f"{name}/r{cutoff}"] = means_RK[:, column]
    values["mean_recall"] = scores["mean_recall"]
    resampled["mean_recall"] = np.mean(list(resampled.values()), axis=0)
    return {key: _measured(value, resampled[key]) for key, value in values.items()}


def metric_interval(
    metric: Callable[[Int64Array], float],
    num_samples: int,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Measured:
    """Return the interval of any metric: `metric` gets the rows of a resample and returns percent.

    Nan leaves a resample out on which the metric is not defined, such as a ROC curve without a positive.
    """
    rng = np.random.default_rng(seed)
    found = np.array([metric(rng.integers(num_samples, size=num_samples)) for _ in range(num_resamples)])
    return _measured(metric(np.arange(num_samples)), found[~np.isnan(found)])


def _resampled_means(columns_QK: Float64Array, rng: np.random.Generator) -> Float64Array:
    num_rows = len(columns_QK)
    block = max(1, _BLOCK_ELEMENTS // num_rows)
    means = []
    for start in range(0, NUM_RESAMPLES, block):
        count = min(block, NUM_RESAMPLES - start)
        drawn = rng.integers(num_rows, size=(count, num_rows))
        drawn += np.arange(count)[:, None] * num_rows
        weights = np.bincount(drawn.ravel(), minlength=count * num_rows).reshape(count, num_rows)
        means.append(weights @ columns_QK / num_rows)
    return np.concatenate(means)


def _measured(value: float, resampled: Sequence[float] | Float64Array) -> Measured:
    if len(resampled) == 0:
        return Measured(value, float("nan"), float("nan"))
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Measured(value, float(low), float(high))
