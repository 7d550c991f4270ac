"""The training loop."""

import dataclasses
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed as dist

from pipeline.core import store
from pipeline.core.records import InputError, Stopped
from training.checkpoint import checkpoint, object_store
from training.checkpoint.checkpoint import Checkpoint
from training.checkpoint.folders import checkpoints_folder, steps_in
from training.checkpoint.selection import Selection, best_first, has_no_gain_left, read_validations, select
from training.checkpoint.start import how_computed
from training.checkpoint.writer import CheckpointWriter
from training.config.train import TrainConfig, shared_steps
from training.data.feeder import Feeder
from training.data.loader import Batch
from training.engine.engine import StepResult, train_step
from training.engine.numbers import NumbersUnderWay, StepNumbers
from training.engine.optim import learning_rate
from training.engine.towers import Engine
from training.engine.zero_state import gathered
from training.metrics import MetricsLog
from training.model.clip import CLIP
from training.ranks.preemption import StopRequest
from training.ranks.watchdog import Watchdog

Recalls = Mapping[str, Mapping[str, Any]]  # evaluation → its numbers in percent
Validate = Callable[[CLIP], Recalls]

# Batches left out one after the other: the model is broken, not the batch.
_MOST_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step whose numbers are under way, and what is to be said of it then."""

    step: int  # counted from 1
    keys: npt.NDArray[np.bytes_]  # [B], this rank's samples
    mean_tokens: float  # of this rank's captions
    result: StepResult
    numbers: NumbersUnderWay


@dataclass(slots=True, kw_only=True)
class Trainer:
    """One stage on one rank, ready to train."""

    stage: str
    config: TrainConfig
    seed: int
    engine: Engine
    batches: Feeder[Batch]
    first_step: int  # steps that were finished before
    best_before: int | None  # the best validated step before it whose weights are there to come back to
    damaged: frozenset[int]  # steps of checkpoints that this start found corrupt
    total_steps: int
    num_samples: int  # of the corpus
    recalls_of: Validate | None
    metrics: MetricsLog
    writer: CheckpointWriter
    stop: StopRequest
    watchdog: Watchdog
    folder: str  # where checkpoints/ are
    store_folder: str | None  # where they are copied to
    identity: Mapping[str, Any]
    under_way: deque[_Begun] = field(default_factory=deque)
    skipped_in_a_row: int = 0
    num_statements: int = 0  # questions of statements that this rank was asked since this start

    def train(self) -> int:
        """Train until the last step or until early stopping triggers; return how many steps are finished.

        Raises:
            InputError: if training fails, or a checkpoint cannot be written.
            Stopped: if a signal asked for it, after a checkpoint.
        """
        step = self.first_step
        if self.validation_is_due(step) and not self.metrics.has_recalls(step):
            self.validate(step)  # the start, or a stop came before it
            self.metrics.pause()
        for batch in self.load():
            step = batch.step + 1
            self.begin(batch)
            self.writer.check()
            signal_number = self.settle(but=1)
            if signal_number or self.is_due(step):
                signal_number = max(signal_number, self.settle())
                if not signal_number and self.validation_is_due(step):
                    self.validate(step)
                    signal_number = self.stop.agreed()
                if signal_number or self.save_is_due(step):
                    self.save(step)
                if signal_number:
                    self.finish_saving(step)
                    name = signal.Signals(signal_number).name
                    raise Stopped(f"by {name} after step {step}, a checkpoint is written")
                self.metrics.pause()
        self.finish_saving(step)
        return step

    def load(self) -> Iterator[Batch]:
        """Yield the batches of the steps to come, until early stopping triggers."""
        self.watchdog.alive(f"reading the batch of step {self.first_step + 1}")
        for batch in self.batches:
            if self.no_longer_gains():
                return
            yield batch
            self.watchdog.alive(f"reading the batch of step {batch.step + 2}")

    def begin(self, batch: Batch) -> None:
        """Have an optimizer step taken; its numbers are read when a later one runs."""
        self.watchdog.alive(f"computing step {batch.step + 1}")
        rate = learning_rate(batch.step, self.total_steps, self.config)
        result = train_step(self.engine, batch, rate, self.config.max_temperature, self.seed)
        towers = self.engine.module
        if towers.averages is not None:
            towers.averages.update(towers.clip, batch.step + 1)
        numbers = NumbersUnderWay(
            result.loss, result.is_skipped, result.temperature, self.stop.received, self.batches.wait_seconds
        )
        mean_tokens = float(batch.tokens_BL.ne(0).sum(1).float().mean())
        self.under_way.append(_Begun(batch.step + 1, batch.keys, mean_tokens, result, numbers))

    def settle(self, *, but: int = 0) -> int:
        """Write down what steps did, all but the newest ones; return the signal that asks all ranks to stop.

        0 if there is none.
        """
        signal_number = 0
        while len(self.under_way) > but:
            begun = self.under_way.popleft()
            signal_number = max(signal_number, self.record(begun, begun.numbers.read()))
        return signal_number

    def record(self, begun: "_Begun", numbers: StepNumbers) -> int:
        """Write down what a step did; return the signal that asks all ranks to stop, 0 if there is none."""
        self.num_statements += begun.result.num_statements
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if numbers.is_skipped else 0
        if numbers.is_skipped:
            self.refuse_non_finite(begun, numbers)
        self.metrics.step(
            begun.step, numbers, learning_rate=begun.result.learning_rate, mean_tokens=begun.mean_tokens
        )
        self.warn_of_statements(begun.step)
        return numbers.signal_number

    def is_due(self, step: int) -> bool:
        """Return true if something follows a step that needs to know what the steps up to it did."""
        return self.validation_is_due(step) or self.save_is_due(step) or step == self.total_steps

    def validate(self, step: int) -> None:
        """Measure the recall of the model as it is: all ranks embed, in the precision of training."""
        if self.recalls_of is None:
            return
        self.watchdog.alive(f"validating after step {step}", between_steps=True)
        started, towers = time.monotonic(), self.engine.module
        clip = towers.clip
        clip.eval()
        with gathered(clip.text_projection, clip.logit_scale), towers.autocast():
            shared = [self.recalls_of(clip)]
        clip.train()
        dist.broadcast_object_list(shared, 0)  # all ranks decide alike: by rank 0's numbers
        self.metrics.recalls(step, shared[0])
        self.metrics.spent("validation", step, time.monotonic() - started)

    def save(self, step: int) -> None:
        """Put a copy of the state together from all ranks; a thread of rank 0 writes it."""
        self.watchdog.alive(f"writing the checkpoint before that of step {step}", between_steps=True)
        started = time.monotonic()
        self.writer.wait()
        self.watchdog.alive(f"copying the checkpoint of step {step}", between_steps=True)
        best = self.selection().best if self.config.choose == "best" else None
        state = checkpoint.gather_state(self.engine, step, self.writer.memory)
        if self.metrics.writes:
            self.metrics.flush()
            root = checkpoints_folder(self.folder)
            # The last one of the warm-up stays: from it `epochs` may be raised.
            warm = [found for found in steps_in(root) if found <= shared_steps(self.config)]
            save = partial(
                checkpoint.save,
                root,
                state,
                self.identity,
                store.read_bytes(self.metrics.metrics_path),
                keep=self.config.keep_checkpoints,
                keep_also={*([] if best is None else [best.step]), *([max(warm)] if warm else [])},
                made_with=how_computed(self.config),
                rank_steps=self.ranked_steps,
                damaged=self.damaged,
            )
            self.writer.start(partial(self.write, save))
        self.metrics.spent("checkpoint", step, time.monotonic() - started)

    def write(self, save: Callable[[], None]) -> None:
        """Write a checkpoint, and copy it to the stage's folder if that is in an object store."""
        save()
        if self.store_folder is not None:
            object_store.send(self.folder, self.store_folder, self.metrics.notice)

    def finish_saving(self, step: int) -> None:
        """Wait until the last checkpoint is written."""
        self.watchdog.alive("writing the last checkpoint", between_steps=True)
        started = time.monotonic()
        self.writer.wait()
        self.metrics.spent("checkpoint", step, time.monotonic() - started)

    def validation_is_due(self, step: int) -> bool:
        """Return true before the first step, at the asked intervals and after the last step."""
        if self.recalls_of is None:
            return False
        batch, every = self.config.global_batch, self.config.validate_every_steps
        seen = step * batch
        ends_epoch = seen // self.num_samples > (seen - batch) // self.num_samples
        return (
            step == 0
            or (every > 0 and step % every == 0)
            or (self.config.validate_every_epoch and ends_epoch)
            or step == self.total_steps
        )

    def save_is_due(self, step: int) -> bool:
        """Return true at the asked intervals, and at a new best if the stage ends with its best weights."""
        if step == self.total_steps or self.no_longer_gains():
            return False  # the weights themselves are written now
        best = self.selection().best
        is_best = self.config.choose == "best" and best is not None and best.step == step
        # If no other checkpoint falls into the warm-up, its end is saved: see `save`.
        ends_warmup = (
            step == self.config.warmup_steps and shared_steps(self.config) < self.config.save_every_steps
        )
        return is_best or ends_warmup or step % self.config.save_every_steps == 0

    def selection(self) -> Selection:
        """Return what the validations up to now say; the same on every rank.

        The best is one whose weights are there: of those before the first step, which an earlier start
        measured, only one may be.
        """
        found, gain = self.metrics.validations, self.config.salient_gain
        there = [item for item in found if item.step >= self.first_step or item.step == self.best_before]
        return dataclasses.replace(select(found, gain), best=select(there, gain).best)

    def no_longer_gains(self) -> bool:
        """Return true if the recipe's rule for early stopping says so (paper, 2.3)."""
        return has_no_gain_left(self.selection(), self.config, self.num_samples)

    def ranked_steps(self, found: Checkpoint) -> list[int]:
        """Return the steps that a stage which resumes from a checkpoint may end with, best first."""
        if self.config.choose != "best":
            return []
        try:
            lines = store.read_text(found.metrics_path).splitlines()
            validations = read_validations(lines, self.config.choose_on)
            return [validation.step for validation in best_first(validations)]
        except (OSError, ValueError, KeyError, TypeError):
            return []  # corrupt: a resume from it reports that

    def refuse_non_finite(self, begun: "_Begun", numbers: StepNumbers) -> None:
        """Name the samples of a batch that changed nothing; stop, or leave it out, by the rule."""
        keys = [key.decode() for key in begun.keys.tolist()]
        step, rank, in_a_row = begun.step, dist.get_rank(), self.skipped_in_a_row
        path = os.path.join(self.folder, f"not_finite_step_{step}_rank_{rank}.json")
        facts = {"step": step, "loss": str(numbers.loss), "what": numbers.skipped, "keys": keys}
        store.write_text(path, json.dumps(facts))
        # The file of every rank has to be there before the first error ends all of them.
        dist.barrier()
        samples = f"rank {rank} had the samples {', '.join(keys[:3])}, … (all {len(keys)} in {path}"
        samples += ", those of other ranks next to it)" if self.config.ranks > 1 else ")"
        found = f"[{self.stage}] {numbers.skipped} at step {step}"
        if self.config.on_non_finite == "skip" and in_a_row <= _MOST_SKIPPED_IN_A_ROW:
            self.metrics.notice(f"{found}: the batch is left out; {samples}")
            return
        also = f", {in_a_row} batches in a row" if in_a_row > 1 else ""
        raise InputError(
            f"{found}{also}; {samples}; lower peak_learning_rate or lengthen warmup_steps, look at these"
            ' samples, or leave such batches out: on_non_finite = "skip"'
        )

    def warn_of_statements(self, step: int) -> None:
        """Warn after a pass over the corpus if no caption led to a statement that the run asks for."""
        pass_steps = max(1, self.num_samples // self.config.global_batch)
        if self.config.negation is None or step - self.first_step != pass_steps:
            return
        asked = torch.tensor(self.num_statements, device=self.engine.module.clip.logit_scale.device)
        dist.all_reduce(asked)
        if not asked:
            self.metrics.notice(
                f"[{self.stage}] negation: in {pass_steps} steps no caption named some of objects ="
                f" {', '.join(self.config.negation.objects)} and not all: the model learned no statement; use"
                " words that these captions contain"
            )
