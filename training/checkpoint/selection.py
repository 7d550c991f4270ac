"""Checkpoint selection and early stopping: the best step, and when training ends (paper, 2.3 and A.2).

A validation's score is the mean of the mean recalls of the deciding evaluation sets, each over six numbers,
or over MUGE's three. Everything here is a function of the scores so far in `metrics.jsonl`, so a run that
resumes from a checkpoint decides like one that was never stopped.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.evaluation_sets import is_scored_image_to_text
from pipeline.core.records import ConfigError
from training.config.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Validation:
    """The score of the weights after `step` steps, in percent."""

    step: int
    score: float


@dataclass(frozen=True, slots=True)
class Selection:
    """The result of the validations so far."""

    best: Validation | None  # highest score, earliest if equal; None before the first validation
    steps_without_gain: int  # from the last validation with a salient gain to the newest


def select(validations: Sequence[Validation], salient_gain: float) -> Selection:
    """Return the best validation and the number of steps since the last salient gain.

    The first validation is a salient gain; a later one is if it beats the last salient one by more than
    `salient_gain` points.
    """
    best: Validation | None = None
    reference: Validation | None = None
    for validation in validations:
        if best is None or validation.score > best.score:
            best = validation
        if reference is None or validation.score > reference.score + salient_gain:
            reference = validation
    return Selection(best, 0 if reference is None else validations[-1].step - reference.step)


def best_first(validations: Iterable[Validation]) -> list[Validation]:
    """Return validations in the order in which a stage prefers their weights."""
    return sorted(validations, key=lambda validation: (-validation.score, validation.step))


def has_no_gain_left(selection: Selection, config: TrainConfig, num_samples: int) -> bool:
    """Return whether `patience` epochs of `num_samples` samples passed without a salient gain (2.3)."""
    return 0 < config.patience * num_samples <= selection.steps_without_gain * config.global_batch


def read_validations(lines: Iterable[str], deciding: Collection[str]) -> list[Validation]:
    """Read the validations in `metrics.jsonl`, without the one before the first step.

    `deciding` names the evaluation sets that count; empty: all of them.
    """
    of_step: dict[int, list[float]] = {}
    for line in lines:
        fields: Mapping[str, Any] = json.loads(line)
        if "evaluation" in fields and (not deciding or fields["evaluation"] in deciding):
            score = _mean_recall(fields["evaluation"], fields["recall"])
            of_step.setdefault(fields["step"], []).append(score)
    return [Validation(step, sum(found) / len(found)) for step, found in sorted(of_step.items()) if step > 0]


def _mean_recall(name: str, recall: Mapping[str, Any]) -> float:
    """Return a line's mean recall; earlier releases also averaged six numbers for MUGE."""
    if recall.get("i2t") is not None and not is_scored_image_to_text(name):
        of_three: Mapping[str, float] = recall["t2i"]
        return sum(of_three.values()) / len(of_three)
    return float(recall["mean_recall"])


def check_sets(config: TrainConfig, evaluations: Collection[str], stage: str) -> None:
    """Check that the run has the evaluation sets by which the stage chooses.

    Raises:
        ConfigError: if a set is missing.
    """
    for name in config.choose_on:
        if name not in evaluations:
            known = ", ".join(sorted(evaluations)) or "none"
            raise ConfigError(f"[{stage}] choose_on: no evaluation set {name!r}; the run has {known}")
    if config.ends_by_recall and not evaluations:
        key = 'averages.use = "best"'
        if config.choose == "best" or config.patience:
            key = 'choose = "best"' if config.choose == "best" else f"patience = {config.patience}"
        raise ConfigError(f"[{stage}] {key} needs an evaluation set, and the run has none")
