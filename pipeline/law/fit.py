"""The power law of error over compute, with the interval in which a further training is expected.

log(error) is linear in log(FLOPs) (Kaplan et al. 2020; for CLIP: Cherti et al. 2023, "Reproducible scaling
laws for contrastive language-image learning"). The interval is that of a prediction by ordinary least squares
with Student's t, so that few points give a wide one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core.records import InputError

LEVEL = 0.9  # of the intervals
FEWEST = 3  # points that a fit needs: two for the line, one to judge it


@dataclass(frozen=True, slots=True)
class Point:
    """What one training reached."""

    flops: float  # of all its steps
    error: float  # 100 - mean recall, in points
    name: str  # of the training


@dataclass(frozen=True, slots=True)
class Prediction:
    """The error expected of a further training, in points, and its interval at LEVEL."""

    flops: float
    error: float
    low: float
    high: float

    def holds(self, error: float) -> bool:
        """Return whether an error lies in the interval."""
        return self.low <= error <= self.high


@dataclass(frozen=True, slots=True)
class Law:
    """error = factor × (FLOPs / center)^-exponent."""

    factor: float
    exponent: float
    center: float  # FLOPs, the geometric mean of the points
    spread: float  # standard error of log(error) around the line
    num_points: int
    sum_squares: float  # of the points' log(FLOPs) around their mean

    def predict(self, flops: float) -> Prediction:
        """Return what a training of so many FLOPs is expected to reach, at most 100 points."""
        from scipy.stats import t

        away = math.log(flops / self.center)
        middle = math.log(self.factor) - self.exponent * away
        deviation = self.spread * math.sqrt(1 + 1 / self.num_points + away**2 / self.sum_squares)
        half = float(t.ppf((1 + LEVEL) / 2, self.num_points - 2)) * deviation
        low, error, high = (min(100.0, math.exp(value)) for value in (middle - half, middle, middle + half))
        return Prediction(flops, error, low, high)


def fit(points: Sequence[Point]) -> Law:
    """Return the law of some trainings.

    Raises:
        InputError: if fewer than FEWEST differ in compute, or one has no error left.
    """
    if perfect := next((point for point in points if not point.error > 0), None):
        raise InputError(
            f"{perfect.name}: mean recall is 100, and no law has an error of 0: take a harder evaluation set"
        )
    if len({point.flops for point in points}) < FEWEST:
        raise InputError(
            f"a law needs {FEWEST} trainings that no cheaper one equals, but the grid has {len(points)}: give"
            " more --models or --epochs"
        )
    x, y = (np.log([getattr(point, name) for point in points]) for name in ("flops", "error"))
    deviation = x - x.mean()
    sum_squares = float(deviation @ deviation)
    slope = float(deviation @ y) / sum_squares
    rest = y - y.mean() - slope * deviation
    spread = math.sqrt(float(rest @ rest) / (len(points) - 2))
    return Law(math.exp(float(y.mean())), -slope, math.exp(float(x.mean())), spread, len(points), sum_squares)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the trainings that no cheaper one, or one of equal compute, equals, by compute."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.flops, point.error)):
        if not best or point.error < best[-1].error:
            best.append(point)
    return best
