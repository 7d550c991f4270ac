"""What a finished grid says: its table, the law, the test on its largest training, and predictions."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.law.fit import FEWEST, LEVEL, Law, Point, Prediction, fit, frontier
from training.config.train import TrainConfig, sized
from training.flops import training_flops
from training.model.config import MODELS

LEGEND = "error: 100 - mean recall, in points; *: no training reached it with less compute"
_TOKENS = 22  # mean length of a caption, as `cnclip plan` assumes
_FAR = 100  # times the largest compute: farther than anything that the grid can vouch for


@dataclass(frozen=True, slots=True)
class Document:
    """`law.json`."""

    trainings: tuple[Point, ...]
    frontier: tuple[str, ...]  # names
    law: Law
    largest: Point | None  # that was predicted from the smaller ones; None if they are too few
    largest_predicted: Prediction | None
    predictions: dict[str, Prediction]


@dataclass(frozen=True, slots=True)
class Conclusion:
    """A document with the lines for a terminal."""

    document: Document
    sentences: list[str]


def table_of(points: Sequence[Point]) -> list[list[str]]:
    """Return the rows of a grid's table, the cheapest training first."""
    best = frontier(points)
    rows = [["training", "petaFLOPs", "error", ""]]
    return rows + [
        [
            point.name.removeprefix("law_"),
            f"{point.flops / 1e15:.4g}",
            f"{point.error:.2f}",
            "*" if point in best else "",
        ]
        for point in sorted(points, key=lambda point: point.flops)
    ]


def conclude(points: Sequence[Point], asked: Sequence[tuple[str, float]], train: TrainConfig) -> Conclusion:
    """Fit the law to the frontier of a grid and predict.

    `asked` are models with samples seen; without any, four times the largest compute is predicted.

    Raises:
        InputError: if the frontier has too few points.
    """
    best = frontier(points)
    law = fit(best)
    sentences = [
        f"law: error = {law.factor:.3g} × (FLOPs / {law.center:.3g})^-{law.exponent:.3g}, over"
        f" {law.num_points} trainings",
    ]
    largest = predicted = None
    if len(best) > FEWEST:
        largest, predicted = best[-1], fit(best[:-1]).predict(best[-1].flops)
        verdict = "lies in" if predicted.holds(largest.error) else "does not lie in"
        sentences.append(
            f"the largest, {largest.name.removeprefix('law_')}, {verdict} the interval that the smaller ones"
            f" predict: {largest.error:.2f}, predicted {_interval(predicted)}"
        )
    else:
        sentences.append(
            f"the largest is not predicted from the smaller ones: that takes {FEWEST + 1} trainings with *"
        )
    most = max(point.flops for point in points)
    flops = {
        f"{model}, {samples:.3g} samples": samples
        * training_flops(sized(MODELS[model], train), train, _TOKENS)
        for model, samples in asked
    } or {"four times the largest compute": 4 * most}
    predictions = {name: law.predict(number) for name, number in flops.items()}
    for name, prediction in predictions.items():
        times = prediction.flops / most
        far = f"; {times:,.0f} times the largest: only a line drawn on" if times > _FAR else ""
        sentences.append(f"{name} ({prediction.flops:.3g} FLOPs): error {_interval(prediction)}{far}")
    document = Document(
        tuple(points), tuple(point.name for point in best), law, largest, predicted, predictions
    )
    return Conclusion(document, sentences)


def _interval(prediction: Prediction) -> str:
    return f"{prediction.error:.2f} ({LEVEL:.0%}: {prediction.low:.2f} to {prediction.high:.2f})"
