"""Where a start of a training job resumes from."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from pipeline.core import store
from pipeline.core.processes import say
from training.checkpoint import checkpoint
from training.checkpoint.checkpoint import Checkpoint
from training.checkpoint.selection import best_first, read_validations
from training.config.job import TrainJob


@dataclass(frozen=True, slots=True)
class Start:
    """Where a start resumes from, and what it came upon."""

    checkpoint: Checkpoint | None  # None: from the first step on
    best_before: int | None  # the best validated step up to there whose weights are there to come back to
    damaged: frozenset[int]  # steps
    notices: tuple[str, ...]


def agree_on_start(job: TrainJob, identity: Mapping[str, Any]) -> Start:
    """Rank 0 removes what kills left and verifies what is there; all resume from the same step."""
    shared = [_find_start(job, identity) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, 0)
    start = shared[0]
    assert start is not None
    return start


def _find_start(job: TrainJob, identity: Mapping[str, Any]) -> Start:
    """Return the newest whole checkpoint, whether or not the best weights before it are still there."""
    root = checkpoint.checkpoints_folder(job.folder)
    checkpoint.sweep(root)
    newest, damage = checkpoint.find_newest(root, identity)
    notices = [
        f"{checkpoint.at_step(root, step).folder}: damaged ({found}): taking the checkpoint before it"
        for step, found in damage.items()
    ]
    if newest is None:
        if damage:
            notices.append(f"{root}: no checkpoint is whole: the stage starts anew")
        return Start(None, None, frozenset(damage), tuple(notices))
    say(f"resuming from {newest.folder}")
    if job.config.choose != "best":
        return Start(newest, None, frozenset(damage), tuple(notices))
    lines = store.read_text(newest.metrics_path).splitlines()
    ranked = best_first(read_validations(lines, job.config.choose_on))
    best = None
    for validation in ranked:
        of_step = checkpoint.at_step(root, validation.step)
        found = None if of_step == newest else checkpoint.find_damage(of_step)
        if found is None:
            best = validation
            break
        if os.path.isdir(of_step.folder):
            damage[validation.step] = found
            notices.append(f"{of_step.folder}: damaged ({found})")
    if ranked and best != ranked[0]:
        left = "" if best is None else f"step {best.step} ({best.score:.2f}) and "
        notices.append(
            f"[{job.stage}] step {ranked[0].step} has the best mean recall so far ({ranked[0].score:.2f}),"
            f" but its weights are no longer there: the best is chosen among {left}the validations to come"
        )
    return Start(newest, None if best is None else best.step, frozenset(damage), tuple(notices))
