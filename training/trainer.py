"""The training loop."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from pipeline.core import store
from pipeline.core.records import InputError, Stopped
from training.checkpoint import checkpoint
from training.checkpoint.checkpoint import Checkpoint
from training.checkpoint.selection import Choice, best_first, choose, has_no_gain_left, read_validations
from training.config.train import TrainConfig
from training.data.loader import Batch, Prefetcher
from training.engine.engine import logit_scale, train_step
from training.engine.optim import learning_rate
from training.engine.zero_state import gathered
from training.metrics import Journal
from training.model.clip import CLIP
from training.ranks.preemption import StopRequest
from training.ranks.watchdog import Watchdog

Recalls = Mapping[str, Mapping[str, Any]]  # evaluation → its numbers in percent
Validate = Callable[[CLIP], Recalls]

# Batches left out one after the other: the model is broken, not the batch.
_MOST_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One stage on one rank, ready to train."""

    stage: str
    config: TrainConfig
    seed: int
    engine: Any  # DeepSpeed's
    batches: Prefetcher
    first_step: int  # steps that were finished before
    best_before: int | None  # the best validated step before it whose weights are there to come back to
    damaged: frozenset[int]  # steps of checkpoints that this start found damaged
    total_steps: int
    num_samples: int  # of the corpus
    validate: Validate | None
    journal: Journal
    stop: StopRequest
    watchdog: Watchdog
    folder: str  # where checkpoints/ are
    identity: Mapping[str, Any]


def train(run: Run) -> int:
    """Train to the last step, or to where it is no longer worth it: load, step, write down, validate, save.

    Returns how many steps are finished. Stopped where a signal asked for it, after a checkpoint.
    """
    if validation_is_due(run, run.first_step) and not run.journal.has_recalls(run.first_step):
        validate(run, run.first_step)  # the start, or a stop came before it
        run.journal.pause()
    step, skipped_in_a_row = run.first_step, 0
    run.watchdog.alive(f"reading the batch of step {step + 1}")
    for batch in run.batches:
        if no_longer_gains(run):
            break
        step = batch.step + 1
        run.watchdog.alive(f"computing step {step}")
        rate = learning_rate(batch.step, run.total_steps, run.config)
        loss = train_step(run.engine, batch, rate, run.config.max_temperature, run.seed)
        skipped = run.engine.module.skipped
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
        if skipped:
            refuse_non_finite(run, batch, loss, skipped_in_a_row)
        number, wait_seconds = run.stop.agreed(run.batches.wait_seconds)
        run.journal.step(batch, loss, temperature(run), rate, wait_seconds, skipped=bool(skipped))
        complain_of_statements(run, step)
        if not number and validation_is_due(run, step):
            validate(run, step)
            number, _ = run.stop.agreed()
        if number:
            save(run, step)
            raise Stopped(f"by {signal.Signals(number).name} after step {step}, a checkpoint is written")
        if save_is_due(run, step):
            save(run, step)
        run.journal.pause()
        run.watchdog.alive(f"reading the batch of step {step + 1}")
    return step


def validation_is_due(run: Run, step: int) -> bool:
    """Before the first step, at the asked intervals and after the last step."""
    if run.validate is None:
        return False
    seen, batch = step * run.config.global_batch, run.config.global_batch
    ends_epoch = seen // run.num_samples > (seen - batch) // run.num_samples
    return (
        step == 0
        or (run.config.validate_every_steps > 0 and step % run.config.validate_every_steps == 0)
        or (run.config.validate_every_epoch and ends_epoch)
        or step == run.total_steps
    )


def save_is_due(run: Run, step: int) -> bool:
    """At the asked intervals, and where the stage ends with its best weights, whenever they are these."""
    if step == run.total_steps or no_longer_gains(run):
        return False  # the weights themselves are written now
    best = choice_so_far(run).best
    is_best = run.config.choose == "best" and best is not None and best.step == step
    return is_best or step % run.config.save_every_steps == 0


def choice_so_far(run: Run) -> Choice:
    """What the validations up to now say; the same on every rank.

    The best is one whose weights are there: of those before the first step, which an earlier start measured,
    only one may be.
    """
    found = run.journal.validations
    there = [item for item in found if item.step >= run.first_step or item.step == run.best_before]
    gain = run.config.salient_gain
    return dataclasses.replace(choose(found, gain), best=choose(there, gain).best)


def no_longer_gains(run: Run) -> bool:
    """The recipe's rule says that training on is not worth it (paper, 2.3)."""
    return has_no_gain_left(choice_so_far(run), run.config, run.num_samples)


def validate(run: Run, step: int) -> None:
    """Recall of the model as it is, by rank 0 alone; the others wait.

    Where every rank has only a part of each weight, all embed, since each needs the others' parts.
    """
    if run.validate is None:
        return
    run.watchdog.alive(f"validating after step {step}", between_steps=True)
    clip: CLIP = run.engine.module.clip
    recalls: Recalls = {}
    if run.journal.writes or run.engine.zero_optimization_partition_weights():
        clip.eval()
        with gathered(clip.text_projection, clip.logit_scale):
            recalls = run.validate(clip)
        clip.train()
    shared = [recalls]  # all ranks decide alike: by rank 0's numbers
    dist.broadcast_object_list(shared, 0)
    run.journal.recalls(step, shared[0])


def save(run: Run, step: int) -> None:
    """A checkpoint, put together by all ranks and written by rank 0."""
    run.watchdog.alive(f"writing the checkpoint of step {step}", between_steps=True)
    best = choice_so_far(run).best if run.config.choose == "best" else None
    state = checkpoint.gather_state(run.engine, step)
    if run.journal.writes:
        run.journal.flush()
        checkpoint.save(
            checkpoints_folder(run.folder),
            state,
            run.identity,
            run.journal.metrics_path,
            keep=run.config.keep_checkpoints,
            keep_also=() if best is None else (best.step,),
            rank_steps=lambda found: ranked_steps(run, found),
            damaged=run.damaged,
        )
    dist.barrier()


def ranked_steps(run: Run, found: Checkpoint) -> list[int]:
    """The steps that a stage which goes on from a checkpoint may end with, best first."""
    if run.config.choose != "best":
        return []
    try:
        lines = store.read_text(found.metrics_path).splitlines()
        validations = read_validations(lines, run.config.choose_on)
        return [validation.step for validation in best_first(validations)]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # damaged: who goes on from it is told


def refuse_non_finite(run: Run, batch: Batch, loss: float, in_a_row: int) -> None:
    """Name the samples of a batch that left the weights as they were; stop, or leave it out, by the rule."""
    keys = [key.decode() for key in batch.keys.tolist()]
    step, what = batch.step + 1, run.engine.module.skipped
    path = os.path.join(run.folder, f"not_finite_step_{step}_rank_{dist.get_rank()}.json")
    store.write_text(path, json.dumps({"step": step, "loss": str(loss), "what": what, "keys": keys}))
    # The file of every rank has to be there before the first error ends all of them.
    dist.barrier()
    samples = f"rank {dist.get_rank()} had the samples {', '.join(keys[:3])}, … (all {len(keys)} in {path}"
    samples += ", those of other ranks beside it)" if run.config.ranks > 1 else ")"
    found = f"[{run.stage}] {what} at step {step}"
    if run.config.on_non_finite == "skip" and in_a_row <= _MOST_SKIPPED_IN_A_ROW:
        run.journal.notice(f"{found}: the batch is left out; {samples}")
        return
    also = f", {in_a_row} batches in a row" if in_a_row > 1 else ""
    raise InputError(
        f"{found}{also}; {samples}; lower peak_learning_rate or lengthen warmup_steps, look at these samples,"
        ' or leave such batches out: on_non_finite = "skip"'
    )


def complain_of_statements(run: Run, step: int) -> None:
    """Say after a pass over the corpus that none of its captions led to a statement that a run asks for."""
    pass_steps = max(1, run.num_samples // run.config.global_batch)
    if run.config.negation is None or step - run.first_step != pass_steps:
        return
    towers = run.engine.module
    asked = torch.tensor(towers.num_asked, device=towers.clip.logit_scale.device)
    dist.all_reduce(asked)
    if not asked:
        run.journal.notice(
            f"[{run.stage}] negation: in {pass_steps} steps no caption named some of objects ="
            f" {', '.join(run.config.negation.objects)} and not all: no statement is learned; name what these"
            " captions name"
        )


def checkpoints_folder(folder: str) -> str:
    """Where a stage's checkpoints are."""
    return os.path.join(folder, "checkpoints")


def temperature(run: Run) -> float:
    """The factor on cosine similarities; a collective."""
    scale: float = logit_scale(run.engine).exp().item()
    return scale
