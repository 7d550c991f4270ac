"""The Pareto front of measured points in recall and speed, with what the noise hides.

Every index is timed once in each round, so two indices are compared round by round: what slows a whole round
down cancels. Student's t over the rounds tells how far apart their speeds must be to differ for certain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.index.bench.points import Point
from pipeline.core.arrays import Float64Array

# A table compares hundreds of pairs, so a lead by chance must be rare in each.
CONFIDENCE = 0.9999
LEAST_LEAD = 0.05  # two processes with one index differ by up to this, round after round
_RECALL_ERRORS = 1.96  # of 95%; cautious, since all indices answer the same queries
_LEAST_RECALL = 0.001


@dataclass(frozen=True, slots=True)
class Noise:
    """What tells the points of one set of queries apart."""

    speed: float  # median factor between two points' speeds from which one is faster for certain, above 1
    recall: float  # median difference of two points' recalls from which one is higher for certain


def pareto_front(points: Sequence[Point], most_bytes: float = np.inf) -> list[Point]:
    """Return the points that no other of the same queries dominates, in order of decreasing recall.

    One point dominates another if it is better beyond the noise in recall or speed and not worse beyond the
    noise in the other. An index that is listed twice is one index: it never dominates itself, and what
    dominates one measurement of it dominates all.

    Args:
        points: measured in one run or in several.
        most_bytes: per vector; larger indices take no part.
    """
    fitting = [point for point in points if point.bytes_per_vector <= most_bytes]
    front = []
    for name in dict.fromkeys(point.queries for point in fitting):
        asked = [point for point in fitting if point.queries == name]
        dominated = {asked[place].twin_key for place in np.flatnonzero(_dominated(asked)).tolist()}
        front += [point for point in asked if point.twin_key not in dominated]
    return sorted(front, key=lambda point: (-point.recall, -point.queries_per_second))


def as_fast(best: Point, points: Sequence[Point]) -> list[Point]:
    """Return the other points whose speed does not differ from the best one's for certain."""
    others = [point for point in points if point is not best]
    if not others:
        return []
    lead_P, noise_P = _leads(_Speeds.of([*others, best]), len(others))
    return [point for place, point in enumerate(others) if abs(lead_P[place]) <= noise_P[place]]


def noise_of(points: Sequence[Point]) -> Noise:
    """Return what tells points of one set of queries apart; nothing if there is one point."""
    if len(points) < 2:
        return Noise(np.inf, np.inf)
    speeds, error_P = _Speeds.of(points), _recall_errors(points)
    by_speed = [np.delete(_leads(speeds, place)[1], place) for place in range(len(points))]
    by_recall = [np.delete(_recall_noise(error_P, place), place) for place in range(len(points))]
    with np.errstate(over="ignore"):
        return Noise(
            float(np.exp(np.median(np.concatenate(by_speed)))), float(np.median(np.concatenate(by_recall)))
        )


def _dominated(points: Sequence[Point]) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Return which points another index dominates."""
    speeds, error_P = _Speeds.of(points), _recall_errors(points)
    recall_P = np.array([point.recall for point in points])
    twins = np.unique([repr(point.twin_key) for point in points], return_inverse=True)[1]
    found_P = np.zeros(len(points), dtype=bool)
    for place in range(len(points)):
        lead_P, noise_P = _leads(speeds, place)  # of the others over this one
        more_P, close_P = recall_P - recall_P[place], _recall_noise(error_P, place)
        is_better_P = (lead_P > noise_P) | (more_P > close_P)
        is_worse_P = (lead_P < -noise_P) | (more_P < -close_P)
        found_P[place] = (is_better_P & ~is_worse_P & (twins != twins[place])).any()
    return found_P


@dataclass(frozen=True, slots=True)
class _Speeds:
    """Logarithms of queries per second by point and round, NaN if a point was not timed in that round."""

    log_PR: Float64Array
    count_P: Float64Array
    mean_P: Float64Array
    var_P: Float64Array
    t_N: Float64Array  # Student's t by number of rounds; infinite below 2

    @classmethod
    def of(cls, points: Sequence[Point]) -> "_Speeds":
        from scipy import stats

        keys = {each.key: 0 for point in points for each in point.rounds}
        keys = {key: place for place, key in enumerate(keys)}
        log_PR = np.full((len(points), max(1, len(keys))), np.nan)
        for row, point in enumerate(points):
            for each in point.rounds:
                log_PR[row, keys[each.key]] = np.log(each.queries_per_second)
            if not point.rounds and point.queries_per_second > 0:
                log_PR[row, 0] = np.log(point.queries_per_second)
        count_P, mean_P, var_P = _moments(log_PR)
        numbers = np.arange(1, int(count_P.max(initial=1)) + 1)
        t_N = np.full(len(numbers) + 1, np.inf)
        t_N[2:] = stats.t.ppf((1 + CONFIDENCE) / 2, numbers[1:] - 1)
        return cls(log_PR, count_P, mean_P, var_P, t_N)


def _leads(speeds: _Speeds, place: int) -> tuple[Float64Array, Float64Array]:
    """Return each point's lead in speed over one of them, and the lead that noise explains, as logarithms."""
    count_P, lead_P, var_P = _moments(speeds.log_PR - speeds.log_PR[place])
    is_paired_P = count_P >= 2
    apart_P = speeds.mean_P - speeds.mean_P[place]
    few_P = np.minimum(speeds.count_P, speeds.count_P[place])
    with np.errstate(invalid="ignore", divide="ignore"):
        paired_P = speeds.t_N[count_P.astype(int)] * np.sqrt(var_P / count_P)
        unpaired_P = speeds.t_N[few_P.astype(int)] * np.sqrt(
            speeds.var_P / speeds.count_P + speeds.var_P[place] / speeds.count_P[place]
        )
    noise_P = np.nan_to_num(np.where(is_paired_P, paired_P, unpaired_P), nan=np.inf, posinf=np.inf)
    return np.nan_to_num(np.where(is_paired_P, lead_P, apart_P)), np.maximum(noise_P, np.log1p(LEAST_LEAD))


def _moments(log_PR: Float64Array) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Return count, mean and variance of the numbers in each row."""
    is_there_PR = ~np.isnan(log_PR)
    count_P = is_there_PR.sum(axis=1).astype(np.float64)
    filled_PR = np.where(is_there_PR, log_PR, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_P = filled_PR.sum(axis=1) / count_P
        off_PR = np.where(is_there_PR, log_PR - mean_P[:, None], 0.0)
        return count_P, mean_P, (off_PR**2).sum(axis=1) / (count_P - 1)


def _recall_errors(points: Sequence[Point]) -> Float64Array:
    return np.array([point.recall_error for point in points], dtype=np.float64)


def _recall_noise(error_P: Float64Array, place: int) -> Float64Array:
    """Return the difference in recall to one of the points that the choice of queries explains."""
    noise_P: Float64Array = np.maximum(_RECALL_ERRORS * np.hypot(error_P, error_P[place]), _LEAST_RECALL)
    return noise_P
