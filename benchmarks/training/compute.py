"""Train the pictures run by the paper's recipe and by cheaper ones: recall for the compute that it took.

    make pictures                                         # the corpus, once
    python benchmarks/training/compute.py                 # trains for 270 s; call again to resume
    python benchmarks/training/compute.py --seeds 0 --arms paper together --seconds 9000
    python benchmarks/training/compute.py --folder runs/other/compute --results runs/other \\
        --set 'corpus.unseen_styles=["emoji-noto", "icons-outline"]'  # other styles are kept back

Every arm starts from one image tower, a ViT that learned English names, and sees the same corpus. `paper` is
the paper's two stages with the augmentation of the pictures run: the tower locked for a third of the epochs,
then everything trained. `together` has Muon, images as they are, half of their side and several positives,
for a third of the epochs. There are arms with each ingredient by itself, in the paper's stages for a third of
the epochs, and arms of `together` without it. Recall is that after the last step, on drawings in styles never
seen and of concepts never seen, at the size of image that was trained last; curves have it after every epoch,
too.

FLOPs are those of matrix products and convolutions, forward and backward, as `cnclip plan` counts them, and
those of Muon's own products; seconds are by the clock, and CPU seconds of all processes, with validation and
start. Every arm is one rank of one thread, so that two calls with different arms share a machine of two
cores; all arms with three seeds take such a machine some nine hours.

Every call writes the finished runs into benchmarks/results/compute.{json,svg}, next to those of earlier calls
with the same settings, so that arms and seeds can be spread over days and machines. A share of the paper's
cost is that within one seed; one of seconds is given only where both ran on the same kind of machine, with as
many ranks.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from benchmarks.training.arms import (
    AS_THEY_ARE,
    BEST,
    HALF_SIDE,
    MUON,
    POSITIVES,
    Experiment,
    OutOfTime,
    Run,
    cpu_seconds_of,
    header,
    is_finished,
    mean_and_spread,
    parser,
    read_runs,
    record_runs,
    seconds_of,
    train_arms,
)
from pipeline.law.grid import flops_of_steps, recalls_at_the_end
from training.config.job import TrainJob
from training.config.phases import with_phases
from training.config.train import PhaseConfig, TrainConfig

PAPER = "paper"
SETS = ("style", "concept")
THIRD = "a third of the epochs"
TOGETHER = "together"
MUON_RATE = {"peak_learning_rate": MUON["peak_learning_rate"]}


class Arm(NamedTuple):
    """Epochs of stage 1, of a phase before the rest of stage 2, and of that; and what they change.

    Epochs are for nine of the paper's, and grow with them.
    """

    stage1: int
    phase: int
    stage2: int
    changes: Mapping[str, Any] = MappingProxyType({})  # of all of stage 2
    of_phase: Mapping[str, Any] = MappingProxyType({})  # only of the phase


def _without(*settings: Mapping[str, Any]) -> dict[str, Any]:
    left_out = {key for one in settings for key in one}
    return {key: value for key, value in BEST.items() if key not in left_out}


ARMS: dict[str, Arm] = {
    PAPER: Arm(3, 0, 6),
    "paper, images as they are": Arm(3, 0, 6, AS_THEY_ARE),
    "paper, Muon": Arm(3, 0, 6, MUON),
    THIRD: Arm(1, 0, 2),
    f"{THIRD}, without stage 1": Arm(0, 0, 2),
    f"{THIRD}, images as they are": Arm(1, 0, 2, AS_THEY_ARE),
    f"{THIRD}, Muon": Arm(1, 0, 2, MUON),
    f"{THIRD}, several positives": Arm(1, 0, 2, POSITIVES),
    f"{THIRD}, sigmoid loss": Arm(1, 0, 2, {**POSITIVES, "loss": "sigmoid"}),
    f"{THIRD}, half of the side, more epochs": Arm(1, 3, 1, {}, HALF_SIDE),
    f"{THIRD}, half of the patches, more epochs": Arm(1, 2, 1, {}, {"patch_mask": 0.5}),
    TOGETHER: Arm(0, 0, 3, BEST),
    f"{TOGETHER}, two epochs": Arm(0, 0, 2, BEST),
    f"{TOGETHER}, without Muon": Arm(0, 0, 3, _without(MUON)),
    f"{TOGETHER}, without Muon, half the rate": Arm(0, 0, 3, {**_without(MUON), "peak_learning_rate": 1e-3}),
    f"{TOGETHER}, without Muon, a quarter of the rate": Arm(
        0, 0, 3, {**_without(MUON), "peak_learning_rate": 5e-4}
    ),
    f"{TOGETHER}, Muon at AdamW's rate": Arm(0, 0, 3, {**BEST, "peak_learning_rate": 2e-3}),
    f"{TOGETHER}, with augmentation": Arm(0, 0, 3, _without(AS_THEY_ARE)),
    f"{TOGETHER}, without several positives": Arm(0, 0, 3, _without(POSITIVES)),
    f"{TOGETHER}, whole images": Arm(0, 0, 3, _without(HALF_SIDE)),
    f"{TOGETHER}, an epoch of whole images": Arm(0, 0, 1, _without(HALF_SIDE)),
    f"{TOGETHER}, then an epoch of whole images": Arm(0, 3, 1, _without(HALF_SIDE), HALF_SIDE),
    f"{TOGETHER}, then one at a fifth of the rate": Arm(
        0, 3, 1, {**_without(HALF_SIDE), "peak_learning_rate": 8e-4}, {**HALF_SIDE, **MUON_RATE}
    ),
    f"{TOGETHER}, six epochs": Arm(0, 0, 6, BEST),
}


def main() -> int:
    flags = parser(__doc__, "runs/compute")
    flags.add_argument("--corpus", default="corpora/pictures", help="folder that `make pictures` built")
    flags.add_argument("--epochs", type=int, default=9, help="of the paper's arm; a third of them is stage 1")
    flags.add_argument("--english-epochs", type=int, default=6, help="of the image tower's own training")
    flags.add_argument(
        "--arms",
        nargs="+",
        choices=list(ARMS),
        default=list(ARMS),
        metavar="ARM",
        help=f"default: all {len(ARMS)}",
    )
    flags.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the pictures run, for all arms"
    )
    options = flags.parse_args()
    what = (
        f"`pictures` with small-vit, {options.epochs} epochs of the paper's two stages, image tower from"
        f" {options.english_epochs} epochs of English names; mean recall in %"
    ) + "".join(f"; {setting}" for setting in options.set)
    path = options.results / "compute.json"
    read_runs(path, what)  # before training, rather than after it
    try:
        experiment = pictures_experiment(options)
    except OutOfTime:
        print("the image tower is not trained yet: rerun the same command to resume")
        return 0
    legs = {
        (name, seed): legs_of(experiment, name, seed, options.epochs)
        for seed in options.seeds
        for name in options.arms
    }
    train_arms(experiment, legs)
    found = [
        {"arm": name, "seed": seed, **header(), "ranks": arm[0].config.ranks, **measured(arm)}
        for (name, seed), arm in legs.items()
        if all(map(is_finished, arm))
    ]
    runs = record_runs(path, what, found, list(ARMS))
    print_table(runs)
    if runs:
        plot(runs, str(path.with_suffix(".svg")))
    return 0


def pictures_experiment(options: argparse.Namespace) -> Experiment:
    """Return the pictures corpus and the English image tower."""
    overrides = [
        f"corpus.folder={options.corpus}",
        f"english.epochs={options.english_epochs}",
        "model.name=small-vit",
        "classification=[]",
        *options.set,
    ]
    folder = Path(options.folder).parent / f"pictures_english_{options.english_epochs}"
    return Experiment(options, "pictures", overrides, str(folder), last="english", first="stage1")


def legs_of(experiment: Experiment, name: str, seed: int, epochs: int) -> list[TrainJob]:
    """Return an arm's trainings in order; each starts with the weights of the one before."""
    arm = ARMS[name]
    stage1, stage2 = experiment.config.stage1, experiment.config.stage2
    assert stage1 is not None
    assert stage2 is not None

    def scaled(of_nine: int) -> int:
        return max(1, round(of_nine * epochs / 9))

    common: dict[str, Any] = {
        "validate_every_steps": 0,
        "validate_every_epoch": True,
        "save_every_steps": 400,
        "ranks": 1,
        "checkpoint_activations": False,  # memory is no concern here, and it would take time
    }
    trainings: list[TrainConfig] = []
    if arm.stage1:
        trainings.append(dataclasses.replace(stage1, epochs=scaled(arm.stage1), **common))
    rate = stage2.peak_learning_rate if arm.stage1 else stage1.peak_learning_rate
    everything = {**common, "peak_learning_rate": rate, **arm.changes}
    phases = (PhaseConfig(epochs=scaled(arm.phase), **arm.of_phase),) if arm.phase else ()
    stage = dataclasses.replace(stage2, epochs=scaled(arm.stage2), phases=phases, **everything)
    trainings += [config for _, config in with_phases("stage2", stage)]
    legs: list[TrainJob] = []
    for number, config in enumerate(trainings, start=1):
        legs.append(
            experiment.leg(
                f"{re.sub(r'[^a-zA-Z0-9]+', '_', name)}_{number}",
                seed,
                config,
                tower=not legs,
                start=legs[-1] if legs else None,
            )
        )
    return legs


def measured(legs: Sequence[TrainJob]) -> Run:
    """Return recall at the end, what all legs took, and the mean recall over petaFLOPs on the way."""
    return {
        "recall": {name: round(recall, 2) for name, recall in recalls_at_the_end(legs[-1].folder).items()},
        "petaflops": round(sum(flops_of_steps(leg.folder) for leg in legs) / 1e15, 4),
        "seconds": round(sum(map(seconds_of, legs))),
        "cpu_seconds": round(sum(map(cpu_seconds_of, legs))),
        "samples": sum(max(line["samples_seen"] for line in _lines(leg)) for leg in legs),
        "curve": curve_of(legs),
    }


def curve_of(legs: Sequence[TrainJob]) -> list[tuple[float, float]]:
    """Return (petaFLOPs, mean recall over SETS) after every epoch of all legs."""
    points, before = [], 0.0
    for leg in legs:
        whole = flops_of_steps(leg.folder)
        of_samples: dict[int, list[float]] = {}
        for line in _lines(leg):
            if line.get("evaluation") in SETS:
                of_samples.setdefault(line["samples_seen"], []).append(line["recall"]["mean_recall"])
        last = max(of_samples)
        for samples, recalls in of_samples.items():
            if samples:  # the weights at 0 are the end of the leg before
                points.append((round((before + whole * samples / last) / 1e15, 4), mean(recalls)))
        before += whole
    return points


def _lines(leg: TrainJob) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (Path(leg.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 2)


def print_table(runs: Sequence[Run]) -> None:
    """Print every arm's recall and cost, the paper's run of the same seed as 100%."""
    of_arm: dict[str, list[Run]] = {}
    for run in runs:
        of_arm.setdefault(run["arm"], []).append(run)
    paper = {run["seed"]: run for run in of_arm.get(PAPER, [])}
    print(f"{'arm':<48} {'style':>12} {'concept':>12} {'FLOPs':>7} {'seconds':>8} {'CPU s':>7}  seeds")
    for name, found in of_arm.items():
        style, concept = (mean_and_spread([run["recall"][one] for run in found]) for one in SETS)
        costs = (
            _share(found, paper, "petaflops"),
            _share(_on_one_machine(found, paper), paper, "seconds"),
            _share(_on_one_machine(found, paper), paper, "cpu_seconds"),
        )
        shares = "{:>7} {:>8} {:>7}".format(*costs)
        print(f"{name:<48} {style:>12} {concept:>12} {shares}  {len(found)}")


def _on_one_machine(found: Sequence[Run], paper: Mapping[int, Run]) -> list[Run]:
    def conditions(run: Run) -> tuple[str, int]:
        return run["machine"], run["ranks"]

    return [
        run for run in found if run["seed"] in paper and conditions(run) == conditions(paper[run["seed"]])
    ]


def _share(found: Sequence[Run], paper: Mapping[int, Run], key: str) -> str:
    shares = [run[key] / paper[run["seed"]][key] for run in found if run["seed"] in paper]
    return f"{np.mean(shares):.0%}" if shares else ""


def plot(runs: Sequence[Run], path: str) -> None:
    """Draw recall over FLOPs, the mean of both sets: a curve for each arm, and a dot for each run's end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "compute", "font.size": 9}):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for number, name in enumerate(dict.fromkeys(run["arm"] for run in runs)):
            found = [run for run in runs if run["arm"] == name]
            # Seeds take the same steps, so that their curves have points at nearly the same FLOPs.
            flops, recalls = np.mean([run["curve"] for run in found], axis=0).T
            (drawn,) = axes.plot(
                1000 * flops, recalls, lw=1, label=name, ls=("-", "--", ":")[number // 10 % 3]
            )  # ten colours
            ends = [np.mean([run["recall"][one] for one in SETS]) for run in found]
            axes.scatter([1000 * run["petaflops"] for run in found], ends, s=14, color=drawn.get_color())
        axes.set_xlim(left=0)
        axes.set_xlabel("teraFLOPs")
        axes.set_ylabel("mean recall on styles and concepts never seen, %")
        figure.legend(frameon=False, fontsize=7, loc="outside right upper")
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
