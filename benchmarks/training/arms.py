"""Run trainings that differ in one thing: what the scripts next to this file share.

All arms read one corpus and start from one model, both made by `cnclip run RECIPE --to STAGE`. An arm's legs
are trained by the launcher and rank program that a run's stages use, each in its own folder; a leg that
was stopped resumes from its newest checkpoint, and one that is finished stays.
"""

import argparse
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import RESULTS, machine
from pipeline.catalog import RANK_MODULE, load
from pipeline.core import store
from pipeline.core.run import make_context
from pipeline.law.grid import recalls_at_the_end
from training.config.job import TrainJob
from training.config.train import AugmentConfig, TrainConfig
from training.ranks.launcher import free_port, launcher_command, launcher_environment
from training.stages import make_job

# The settings of `together` in compute.py, by ingredient; the findings train with them, too
MUON: Mapping[str, Any] = {"optimizer": "muon", "peak_learning_rate": 4e-3}
POSITIVES: Mapping[str, Any] = {"exclude_duplicates": False, "several_positives": True}
AS_THEY_ARE: Mapping[str, Any] = {
    "augment": AugmentConfig(
        crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), horizontal_flip=0.0, auto_augment="none"
    )
}
HALF_SIDE: Mapping[str, Any] = {"image_size_px": 24}
BEST: Mapping[str, Any] = {**MUON, **POSITIVES, **AS_THEY_ARE, **HALF_SIDE}

STARTED = time.monotonic()  # of this call, whose --seconds all its trainings share


class OutOfTime(Exception):
    """The time is over; the same command resumes."""


def parser(description: str | None, folder: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts take."""
    options = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    options.add_argument("--folder", default=folder, help="where corpus, first model and arms are kept")
    options.add_argument("--seconds", type=float, default=270, help="of training in this call")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    return options


def add_emoji_options(options: argparse.ArgumentParser) -> None:
    """Add the options of the scripts on the emoji run."""
    options.add_argument("--corpus", help="folder of the emoji tables; unset: the recipe's")
    options.add_argument("--english-epochs", type=int, default=12, help="of the image tower's own training")


def emoji_experiment(options: argparse.Namespace) -> "Experiment":
    """Return the emoji corpus and the English image tower."""
    overrides = [f"english.epochs={options.english_epochs}"]
    if options.corpus:
        overrides.append(f"corpus.folder={options.corpus}")
    folder = Path(options.folder).parent / f"emoji_english_{options.english_epochs}"
    return Experiment(options, "emoji_zh", overrides, str(folder), last="english", first="stage1")


class Experiment:
    """A corpus, the model of the stage `last`, and arms that start where the stage `first` would."""

    def __init__(
        self,
        options: argparse.Namespace,
        recipe: str,
        overrides: list[str],
        run_folder: str,
        *,
        last: str,
        first: str,
    ) -> None:
        self.folder, self._end = Path(options.folder), STARTED + options.seconds
        overrides = [f"run.folder={run_folder}", *overrides]
        sets = [part for override in overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "pipeline", "run", recipe, *sets, "--to", last]
        self._call(command, signal.SIGINT)
        self.run, self.config = load(recipe, overrides)
        stage = self.run.stage(first)
        context = make_context(self.run, stage)
        assert context is not None, f"the {last} stage ended without its manifest"
        self.first_job = make_job(stage.config, context)

    def leg(
        self, name: str, seed: int, config: TrainConfig, *, tower: bool, start: TrainJob | None = None
    ) -> TrainJob:
        """Return a training from the English tower, another leg's weights (`start`), or nothing."""
        folder = self.folder / f"{name}_seed{seed}"
        return dataclasses.replace(
            self.first_job,
            seed=seed,
            config=config,
            image_weights=self.first_job.image_weights if tower else None,
            start_checkpoint=start.output_model if start else None,
            folder=str(folder),
            output_model=str(folder / "model.safetensors"),
        )

    def train(self, job: TrainJob) -> None:
        """Train a leg to its end, or as far as the time goes (OutOfTime)."""
        if os.path.exists(job.output_model):
            return
        folder = Path(job.folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "job.json"
        path.write_text(job.to_json(), encoding="utf-8")
        start, cpu = time.monotonic(), _cpu_seconds_of_children()
        try:
            self._call(
                launcher_command("local", RANK_MODULE, str(path), job.config.ranks, free_port()),
                signal.SIGTERM,
            )
        finally:
            with open(folder / "seconds.txt", "a", encoding="utf-8") as file:
                file.write(f"{time.monotonic() - start} {_cpu_seconds_of_children() - cpu}\n")

    def _call(self, command: list[str], stop: signal.Signals) -> None:
        seconds = self._end - time.monotonic()
        if seconds < 20:
            raise OutOfTime  # less than it takes to start
        environment = launcher_environment(os.environ, threads_per_rank=1)
        process = subprocess.Popen(command, env=environment)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(stop)
            process.wait()
            raise OutOfTime from None
        if status:
            raise SystemExit(f"{' '.join(command[:4])} … ended with status {status}")


Run = dict[str, Any]  # what a record says of one arm and seed
Arms = Mapping[tuple[str, int], Sequence[TrainJob]]  # by name and seed: trainings, one after the other


def train_arms(experiment: Experiment, arms: Arms) -> bool:
    """Train as far as the time goes; return whether all are finished."""
    try:
        for legs in arms.values():
            for leg in legs:
                experiment.train(leg)
    except OutOfTime:
        print("out of time: rerun the same command to resume")
        return False
    return True


def report_arms(options: argparse.Namespace, name: str, what: str, arms: Arms, **facts: Any) -> None:
    """Print the recall of all finished arms, and record them in <name>.json of --results."""
    found = [
        {
            "arm": arm,
            "seed": seed,
            **header(),
            "recall": {key: round(value, 2) for key, value in recalls_at_the_end(legs[-1].folder).items()},
            "seconds": round(sum(map(seconds_of, legs))),
            "cpu_seconds": round(sum(map(cpu_seconds_of, legs))),
        }
        for (arm, seed), legs in arms.items()
        if all(map(is_finished, legs))
    ]
    names = list(dict.fromkeys(arm for arm, _ in arms))
    runs = record_runs(options.results / f"{name}.json", what, found, names, **facts)
    for arm in dict.fromkeys(run["arm"] for run in runs):
        recalls: list[dict[str, float]] = [run["recall"] for run in runs if run["arm"] == arm]
        columns = (f"{key} {mean_and_spread([recall[key] for recall in recalls])}" for key in recalls[0])
        print(f"{arm:<36} {', '.join(columns)}; {len(recalls)} seeds")


def record_runs(path: Path, what: str, found: Sequence[Run], arms: Sequence[str], **facts: Any) -> list[Run]:
    """Add finished runs to a results file; return all that it has now, in the order of `arms`.

    Runs of other arms and seeds stay: of earlier calls, on other machines too. `what` names the settings
    that all have in common, and `facts` stand next to it.

    Raises:
        SystemExit: if the file has runs of other settings, which stay as they are.
    """
    recorded = read_runs(path, what)
    if not found:
        return recorded
    merged = {(run["arm"], run["seed"]): run for run in [*recorded, *found]}
    place = {arm: number for number, arm in enumerate(arms)}  # an arm that is no longer there comes last
    runs = sorted(merged.values(), key=lambda run: (place.get(run["arm"], len(arms)), run["seed"]))
    write_report(path, {"what": what, **facts, "runs": runs})
    print(f"wrote {path}: {len(runs)} runs")
    return runs


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a results file, whole or not at all; its folder is made if it is not there."""
    store.write_text(str(path), json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def read_runs(path: Path, what: str) -> list[Run]:
    """Return the runs of a results file; none if there is no file.

    Raises:
        SystemExit: if they are of other settings.
    """
    if not path.exists():
        return []
    recorded = json.loads(path.read_text(encoding="utf-8"))
    if recorded["what"] != what:
        raise SystemExit(
            f"{path} has runs of other settings ({recorded['what']}); give these another folder by --results"
        )
    runs: list[Run] = recorded["runs"]
    return runs


def curve(job: TrainJob) -> dict[int, Mapping[str, Any]]:
    """Return recall of the one evaluation by number of samples seen; empty before the first validation."""
    path = Path(job.folder) / "metrics.jsonl"
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return {line["samples_seen"]: line["recall"] for line in lines if "evaluation" in line}


def is_finished(job: TrainJob) -> bool:
    return os.path.exists(job.output_model)


def seconds_of(job: TrainJob) -> float:
    """Return wall seconds of a leg, over all its starts."""
    return float(_seconds(job)[0])


def cpu_seconds_of(job: TrainJob) -> float:
    """Return CPU seconds of a leg, over all its starts: they hold on a machine that other work shares."""
    return float(_seconds(job)[1])


def _seconds(job: TrainJob) -> np.ndarray:
    return np.loadtxt(Path(job.folder) / "seconds.txt", ndmin=2).sum(axis=0)


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def mean_and_spread(values: list[float]) -> str:
    """Return "mean ± standard deviation" over seeds."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def header() -> dict[str, str]:
    """Return the commit and the machine, which every results file names."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {"commit": commit.stdout.strip(), "machine": f"{machine()}, no GPU"}
