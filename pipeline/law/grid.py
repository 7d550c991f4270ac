"""The grid of small trainings: stages of the run that its other stages do not wait for."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.catalog import RANK_MODULE, RunConfig
from pipeline.core import store
from pipeline.core.records import ConfigError, InputError
from pipeline.core.run import Run
from pipeline.core.stage import Stage
from pipeline.law.fit import FEWEST, Point
from training import stages as training_stages
from training.config.train import check_fits
from training.model.config import MODELS
from training.stages import METRICS_FILE, TrainStageConfig

_LOG_FILE = "log.jsonl"


@dataclass(frozen=True, slots=True)
class Cell:
    """One training of the grid."""

    model: str  # key of training.model.config.MODELS
    epochs: int
    rate: float  # peak learning rate

    @property
    def name(self) -> str:
        """Return the name of its stage and folder."""
        return f"law_{self.model}_{self.epochs}_epochs_{self.rate:g}"


def make_grid(models: Sequence[str], epochs: Sequence[int], rates: Sequence[float]) -> list[Cell]:
    """Return every combination, the cheapest first.

    Raises:
        ConfigError: if a model is unknown, a number is not above 0, or too few trainings differ in compute.
    """
    for model in models:
        if model not in MODELS:
            raise ConfigError(f"--models {model}: unknown; known: {', '.join(sorted(MODELS))}")
    for option, numbers in (("--epochs", epochs), ("--rates", rates)):
        for number in numbers:
            if not number > 0:
                raise ConfigError(f"{option} {number:g}: must be greater than 0")
    sizes = list(itertools.product(dict.fromkeys(models), sorted({*epochs})))
    if len(sizes) < FEWEST:
        raise ConfigError(
            f"--models and --epochs give {len(sizes)} trainings that differ in compute, but a law needs"
            f" {FEWEST}: give more of either"
        )
    return [Cell(model, number, rate) for model, number in sizes for rate in sorted({*rates})]


def settings_of(run: Run, stage: str | None) -> TrainStageConfig:
    """Return the settings of a run's training stage; of the last one that a grid can have for None.

    Raises:
        ConfigError: if it has no such training, or a grid cannot have its settings.
    """
    if stage is None:
        trainings = [item for item in run.stages if isinstance(item.config, TrainStageConfig)]
        if not trainings:
            raise ConfigError("the run trains no model: add [stage2], for example")
        fitting = [item.name for item in trainings if _reason_against(item.config) is None]
        stage = fitting[-1] if fitting else trainings[-1].name
    config: Any = run.stage(stage).config
    if not isinstance(config, TrainStageConfig):
        raise ConfigError(f"--stage {stage}: not a training stage")
    if reason := _reason_against(config):
        raise ConfigError(
            f"--stage {stage} {reason}: name a stage that trains both towers on Chinese captions"
        )
    return config


def _reason_against(config: TrainStageConfig) -> str | None:
    if config.train.lock_image:
        return "locks the image tower, which the grid starts from nothing"
    return None if config.validate else "is not scored"


def with_grid(run: Run, config: RunConfig, own: TrainStageConfig, cells: Sequence[Cell]) -> Run:
    """Return a run that ends with the grid instead of its own trainings, in the same folder.

    Every cell has the settings of a training stage, `own`, and starts from nothing: weights fit one size.
    """
    first = next(
        number for number, item in enumerate(run.stages) if isinstance(item.config, TrainStageConfig)
    )
    grid = [_stage_of(cell, own, config) for cell in cells]
    return dataclasses.replace(run, stages=(*run.stages[:first], *grid))


def _stage_of(cell: Cell, own: TrainStageConfig, config: RunConfig) -> Stage:
    train = dataclasses.replace(
        own.train,
        epochs=cell.epochs,
        peak_learning_rate=cell.rate,
        validate_every_steps=0,
        validate_every_epoch=False,
        choose="last",
        patience=0,
        averages=None,
    )
    check_fits(train, MODELS[cell.model], cell.name)
    job = TrainStageConfig(
        train=train,
        model=cell.model,
        vocabulary=own.vocabulary,
        launcher=own.launcher,
        tracking=own.tracking,
    )
    return training_stages.stage(cell.name, job, before=None, entry=RANK_MODULE, sets_from=config.sets_from)


def measure(run: Run, cell: Cell, evaluation: str | None) -> Point:
    """Return what a finished cell reached: on one evaluation set, or the mean over all.

    Raises:
        InputError: if the run does not have that set, or none at all.
    """
    folder = store.join(run.folder, cell.name)
    last = recalls_at_the_end(folder)
    if not last:
        raise InputError(
            f"{folder}: not scored on any evaluation set; give the run an [[evaluation]] or [split]"
        )
    if evaluation is not None and evaluation not in last:
        raise InputError(f"--on {evaluation}: no such evaluation set; the run has {', '.join(sorted(last))}")
    recalls = [last[evaluation]] if evaluation is not None else list(last.values())
    return Point(flops_of_steps(folder), 100 - sum(recalls) / len(recalls), cell.name)


def recalls_at_the_end(folder: str) -> dict[str, float]:
    """Return a training's last mean recall on each evaluation set, in percent."""
    lines = _lines(store.join(folder, METRICS_FILE))
    return {line["evaluation"]: line["recall"]["mean_recall"] for line in lines if "evaluation" in line}


def flops_of_steps(folder: str) -> float:
    """Return the FLOPs of all steps of a training; one that was taken again after a stop counts once."""
    of_step = {
        line["step"]: line["teraflops"] * 1e12 * line["seconds"]
        for line in _lines(store.join(folder, _LOG_FILE))
        if "teraflops" in line  # validations and checkpoints have lines too
    }
    total: float = sum(of_step.values())
    return total


def _lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.read_text(path).splitlines()]
