"""The law of error over compute against scikit-learn's line and simulated trainings."""

import math

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from pipeline.core.records import InputError
from pipeline.law.fit import LEVEL, Point, fit, frontier


def points(flops: list[float], errors: list[float]) -> list[Point]:
    return [Point(*pair, f"law_{number}") for number, pair in enumerate(zip(flops, errors, strict=True))]


def test_an_exact_power_law_is_found_and_extended() -> None:
    flops = [1e12, 4e12, 1e13, 6e13]
    law = fit(points(flops, [80 * (one / 1e12) ** -0.15 for one in flops]))
    assert law.exponent == pytest.approx(0.15)
    predicted = law.predict(1e15)
    assert predicted.error == pytest.approx(80 * 1000**-0.15)
    assert predicted.low == pytest.approx(predicted.high, rel=1e-6)
    assert predicted.holds(80 * 1000**-0.15)


def test_the_line_is_that_of_least_squares() -> None:
    random = np.random.default_rng(2)
    flops, errors = random.uniform(1e12, 1e15, 9), random.uniform(20, 90, 9)
    law = fit(points(flops.tolist(), errors.tolist()))
    line = LinearRegression().fit(np.log(flops)[:, None], np.log(errors))
    assert law.exponent == pytest.approx(-line.coef_[0])
    assert law.predict(3e14).error == pytest.approx(math.exp(line.predict([[math.log(3e14)]])[0]))


def test_the_interval_holds_as_often_as_it_says() -> None:
    """Simulated trainings around a law: the next size lies in the interval in 90% of 2,000 grids."""
    random = np.random.default_rng(7)
    flops = np.geomspace(1e12, 1e14, 5)
    held = 0
    for _ in range(2000):
        noise = random.normal(0, 0.03, 6)
        errors = 80 * (np.append(flops, 4e14) / 1e12) ** -0.1 * np.exp(noise)
        held += fit(points(flops.tolist(), errors[:-1].tolist())).predict(4e14).holds(errors[-1])
    assert held / 2000 == pytest.approx(LEVEL, abs=0.02)


def test_no_error_is_predicted_above_a_hundred_points() -> None:
    law = fit(points([1e12, 2e12, 4e12], [99.0, 90.0, 97.0]))
    assert law.predict(1e9).high == 100.0


def test_the_frontier_leaves_out_what_costs_more_for_less() -> None:
    found = frontier(points([4.0, 1.0, 2.0, 2.0, 3.0, 8.0], [50.0, 90.0, 80.0, 70.0, 75.0, 50.0]))
    assert [(point.flops, point.error) for point in found] == [(1.0, 90.0), (2.0, 70.0), (4.0, 50.0)]


def test_too_few_trainings_are_refused() -> None:
    with pytest.raises(
        InputError, match="a law needs 3 trainings that no cheaper one equals, but the grid has 2"
    ):
        fit(points([1e12, 2e12], [80.0, 70.0]))


def test_a_perfect_training_has_no_law() -> None:
    with pytest.raises(InputError, match="law_2: mean recall is 100, and no law has an error of 0"):
        fit(points([1e12, 2e12, 3e12], [80.0, 70.0, 0.0]))
