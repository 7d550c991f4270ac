"""Repeat the paper's Figure 2 in small, on the emoji run: from scratch, without locking, and in two stages.

    python benchmarks/training/figure2.py   # trains for 270 s; call again to resume
    python benchmarks/training/figure2.py --seconds 3000   # in one go

Three arms see the same number of samples with each seed: all weights from nothing; the image tower from
English names and nothing locked (the recipe's first learning rate, as the arm from nothing); the same tower,
locked for the first third (stage 1), then everything trained (stage 2), each stage with the recipe's
settings. Writes the curves of mean recall over samples seen, with the band between the lowest and the highest
seed, to benchmarks/results/figure2.{json,svg}, and says which of the paper's findings hold.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dataclasses
import json
from typing import Any

import numpy as np

from benchmarks.training.arms import (
    Experiment,
    OutOfTime,
    add_emoji_options,
    curve,
    emoji_experiment,
    header,
    is_finished,
    mean_and_spread,
    parser,
    train_arms,
    write_report,
)
from training.config.job import TrainJob

SCRATCH, UNLOCKED, TWO_STAGE = "from scratch", "without locking", "two stages"
VALIDATE_EVERY = 41  # steps: half an epoch


def main() -> int:
    flags = parser(__doc__, "runs/figure2")
    add_emoji_options(flags)
    flags.add_argument("--epochs", type=int, default=6, help="of every arm; a third of them is stage 1")
    options = flags.parse_args()
    try:
        experiment = emoji_experiment(options)
    except OutOfTime:
        print("the image tower is not trained yet: rerun the same command to resume")
        return 0
    arms = {
        (name, seed): legs for seed in options.seeds for name, legs in _arms(experiment, seed, options.epochs)
    }
    train_arms(experiment, arms)
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for (name, seed), legs in arms.items():
        if all(map(is_finished, legs)):
            curves.setdefault(name, {})[seed] = _joined(legs)
    report: dict[str, Any] = {
        **header(),
        "what": f"mean recall (%) on {options.epochs} epochs; image tower from"
        f" {options.english_epochs} epochs of English names; samples seen → recall, by seed",
        "curves": curves,
        "findings": findings(curves, (options.epochs // 3) / options.epochs),
    }
    for name, of_seeds in curves.items():
        ends = [_last(points) for points in of_seeds.values()]
        print(f"{name:<16} {mean_and_spread(ends)}, {len(ends)} seeds")
    for finding in report["findings"]:
        print(finding)
    print(json.dumps(report))
    if len(curves) == 3 and all(len(of_seeds) == len(options.seeds) for of_seeds in curves.values()):
        write_report(options.results / "figure2.json", report)
        plot(curves, str(options.results / "figure2.svg"))
    return 0


def _arms(experiment: Experiment, seed: int, epochs: int) -> list[tuple[str, list[TrainJob]]]:
    stage1, stage2 = experiment.config.stage1, experiment.config.stage2
    assert stage1 is not None
    assert stage2 is not None
    often = {"validate_every_steps": VALIDATE_EVERY, "save_every_steps": VALIDATE_EVERY}
    stage1 = dataclasses.replace(stage1, epochs=epochs // 3, **often)
    stage2 = dataclasses.replace(stage2, epochs=epochs - epochs // 3, **often)
    whole = dataclasses.replace(stage2, epochs=epochs, peak_learning_rate=stage1.peak_learning_rate)
    first = experiment.leg("two_stages_1", seed, stage1, tower=True)
    return [
        (TWO_STAGE, [first, experiment.leg("two_stages_2", seed, stage2, tower=False, start=first)]),
        (UNLOCKED, [experiment.leg("without_locking", seed, whole, tower=True)]),
        (SCRATCH, [experiment.leg("from_scratch", seed, whole, tower=False)]),
    ]


def _joined(legs: list[TrainJob]) -> dict[int, float]:
    """Return mean recall by samples seen over all legs; a later leg's start is the former's end."""
    points: dict[int, float] = {}
    seen = 0
    for leg in legs:
        points |= {seen + samples: float(recall["mean_recall"]) for samples, recall in curve(leg).items()}
        seen = max(points)
    return points


def _last(points: dict[int, float]) -> float:
    return points[max(points)]


def findings(curves: dict[str, dict[int, dict[int, float]]], stage1_share: float) -> list[str]:
    """Return the paper's three observations on its Figure 2, each with the figures that it is judged by."""
    if len(curves) < 3:
        return []
    ends = {name: [_last(points) for points in of_seeds.values()] for name, of_seeds in curves.items()}
    stage1 = [points[_nearest(points, max(points) * stage1_share)] for points in curves[TWO_STAGE].values()]
    statements = (
        ("a pretrained image tower beats training from scratch", ends[UNLOCKED], ends[SCRATCH]),
        (
            "two stages beat training without locking (the paper: on Flickr30K-CN and COCO-CN, not on MUGE)",
            ends[TWO_STAGE],
            ends[UNLOCKED],
        ),
        ("stage 2 lifts recall above the end of stage 1", ends[TWO_STAGE], stage1),
    )
    return [f"{text}: {_verdict(better, worse)}" for text, better, worse in statements]


def _verdict(better: list[float], worse: list[float]) -> str:
    figures = f"{mean_and_spread(better)} against {mean_and_spread(worse)}"
    if min(better) > max(worse):
        return f"holds, in every pair of seeds ({figures})"
    if max(better) < min(worse):
        return f"does not hold, in any pair of seeds ({figures})"
    return f"open: the seeds overlap ({figures})"


def _nearest(points: dict[int, float], samples: float) -> int:
    return min(points, key=lambda seen: abs(seen - samples))


def plot(curves: dict[str, dict[int, dict[int, float]]], path: str) -> None:
    """Draw the mean over seeds, and the band from the lowest to the highest."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "figure2", "font.size": 9}):
        figure = Figure(figsize=(6.0, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, of_seeds in curves.items():
            samples = sorted(set.intersection(*(set(points) for points in of_seeds.values())))
            recall_SX = np.array([[points[seen] for seen in samples] for points in of_seeds.values()])
            axes.fill_between(samples, recall_SX.min(0), recall_SX.max(0), alpha=0.2, linewidth=0)
            axes.plot(samples, recall_SX.mean(0), label=f"{name} ({len(of_seeds)} seeds)")
        axes.set_xlabel("samples seen")
        axes.set_ylabel("mean recall on a vendor never seen, %")
        axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
