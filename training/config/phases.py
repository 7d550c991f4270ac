"""Phases of a training stage: earlier, cheaper trainings whose weights it continues with."""

import dataclasses

from training.config.train import TrainConfig


def with_phases(name: str, train: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Return a stage's phases in order, the stage itself last, each with its name and all its settings.

    Every phase is a training of its own: with its own warm-up, cosine and optimizer (CLIPA, Li et al. 2023).

    Raises:
        ValueError: if the settings of a phase do not fit together; it names the phase.
    """
    alone = dataclasses.replace(train, phases=())
    found = []
    for number, phase in enumerate(train.phases, start=1):
        given = {
            field.name: getattr(phase, field.name)
            for field in dataclasses.fields(phase)
            if getattr(phase, field.name) is not None
        }
        if (
            train.distil is not None
            and given.get("image_size_px", train.image_size_px) != train.image_size_px
        ):
            raise ValueError(
                f"phase {number}: image_size_px = {phase.image_size_px}, but distil.teacher reads images of"
                " the stage's size in every phase; leave one of them out"
            )
        if given.get("global_batch", train.global_batch) != train.global_batch:
            given["lanes"] = None  # derived from the batch
        try:
            found.append((phase_name(name, number), dataclasses.replace(alone, **given)))
        except ValueError as error:
            raise ValueError(f"phase {number}: {error}") from None
    return [*found, (name, alone)]


def phase_name(stage: str, number: int) -> str:
    """Return the name of a stage's phase, from 1: of its folder, and in messages."""
    return f"{stage}_phase{number}"
