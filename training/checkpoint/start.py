"""Decides from which checkpoint a training job resumes."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from pipeline.core import store
from pipeline.core.config import plain
from pipeline.core.processes import say
from training.checkpoint import checkpoint, object_store
from training.checkpoint.checkpoint import Checkpoint
from training.checkpoint.folders import checkpoints_folder
from training.checkpoint.selection import best_first, read_validations
from training.config.deepspeed_file import computed_in, read_deepspeed_file
from training.config.job import TrainJob
from training.config.train import TrainConfig, count_steps, shared_steps


@dataclass(frozen=True, slots=True)
class Start:
    """The checkpoint from which a job resumes, and the findings of the search."""

    checkpoint: Checkpoint | None  # None: start at the first step
    best_before: int | None  # the best validated step so far with intact weights
    damaged: frozenset[int]  # steps
    notices: tuple[str, ...]


def agree_on_start(job: TrainJob, identity: Mapping[str, Any]) -> Start:
    """Return the start that rank 0 finds, after removing leftovers of kills; all ranks get the same one.

    Its checkpoint is on every rank's machine.

    Raises:
        InputError: if the checkpoint is another run's, or cannot be copied from an object store.
    """
    if job.store_folder is not None and dist.get_rank() == 0:
        object_store.bring(job.folder, job.store_folder)
    shared = [_find_start(job, identity) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, 0)
    start = shared[0]
    assert start is not None
    if job.store_folder is not None and start.checkpoint is not None:
        if os.environ["LOCAL_RANK"] == "0":  # of another machine than rank 0's, which has it
            root, remote_root = map(checkpoints_folder, (job.folder, job.store_folder))
            object_store.bring_checkpoint(root, remote_root, start.checkpoint.step)
        dist.barrier()
    return start


def _find_start(job: TrainJob, identity: Mapping[str, Any]) -> Start:
    """Return the newest intact checkpoint, even if the best weights before it are gone."""
    root = checkpoints_folder(job.folder)
    checkpoint.sweep(root)
    shared = shared_steps(job.config)
    epochs, removed = checkpoint.remove_other_schedules(root, identity, shared)
    newest, damage = checkpoint.find_newest(root, identity, shared)
    notices = [
        f"{checkpoint.at_step(root, step).folder}: damaged ({found}): using the checkpoint before it"
        for step, found in damage.items()
    ]
    if newest is None:
        if damage:
            notices.append(f"{root}: no checkpoint is intact: the stage starts from the first step")
        return Start(None, None, frozenset(damage), tuple(notices))
    say(f"resuming from {newest.folder}")
    notices += _changes(job, newest, epochs, removed)
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
            f" but its weights are gone: the best is chosen among {left}the validations to come"
        )
    return Start(newest, None if best is None else best.step, frozenset(damage), tuple(notices))


def how_computed(config: TrainConfig) -> dict[str, Any]:
    """Return what may change between two starts of a job: how it runs, not what it learns."""
    learned = plain(config, without=("never", "once done"))
    how = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in learned
    }
    settings = read_deepspeed_file(config.deepspeed)
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    found: dict[str, Any] = json.loads(json.dumps(how))  # as a checkpoint stores it
    return {**found, "ZeRO stage": stage, "precision": computed_in(settings)}


def _changes(job: TrainJob, resumed: Checkpoint, epochs_removed: int, removed: list[int]) -> list[str]:
    """Return notices of changes in computation or schedule since a checkpoint was saved."""
    notices, before, now = [], checkpoint.made_with(resumed), how_computed(job.config)
    if changed := [
        f"{key} {before[key]} → {now[key]}" for key in now if before.get(key, now[key]) != now[key]
    ]:
        notices.append(f"[{job.stage}] resumes from step {resumed.step} with {', '.join(changed)}")
    epochs = epochs_removed or checkpoint.saved_epochs(resumed)
    if epochs != job.config.epochs:
        num_samples = sum(shard.num_samples for shard in job.shards)
        total = count_steps(job.config, num_samples, job.stage)
        steps = ", ".join(map(str, removed))
        also = f"; the checkpoints of steps {steps} followed the old cosine and are removed"
        notices.append(
            f"[{job.stage}] epochs {epochs} → {job.config.epochs}: resumes from step {resumed.step}, up to"
            f" which both schedules are the same; the learning rate then follows a cosine to 0 at step"
            f" {total}"
            f"{also if removed else ''}"
        )
    return notices
