"""The training loop, and what it writes while it runs."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from pipeline import store
from pipeline.records import InputError
from training import checkpoint
from training.config import TrainConfig
from training.data import Batch, Prefetcher
from training.engine import logit_scale, train_step
from training.model.clip import CLIP
from training.optim import learning_rate
from training.partitions import gathered

Recalls = Mapping[str, Mapping[str, Any]]  # evaluation → its numbers in percent
Validate = Callable[[CLIP], Recalls]

_SECONDS_BETWEEN_PROGRESS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One stage on one rank, ready to train."""

    stage: str
    config: TrainConfig
    seed: int
    engine: Any  # DeepSpeed's
    batches: Prefetcher
    first_step: int  # steps that were finished before
    total_steps: int
    validate: Validate | None
    journal: "Journal"
    folder: str  # where checkpoints/ are
    identity: Mapping[str, Any]


def train(run: Run) -> None:
    """Train to the last step: load, step, write down, validate, save."""
    if run.first_step == 0:
        validate(run, 0)
    for batch in run.batches:
        rate = learning_rate(batch.step, run.total_steps, run.config)
        loss = train_step(run.engine, batch, rate, run.config.max_temperature, run.seed)
        refuse_non_finite(run, batch, loss)
        step = batch.step + 1
        run.journal.step(step, loss, temperature(run), rate, run.batches.wait_seconds)
        if step % run.config.validate_every_steps == 0 or step == run.total_steps:
            validate(run, step)
        if step % run.config.save_every_steps == 0 and step < run.total_steps:
            save(run, step)


def validate(run: Run, step: int) -> None:
    """Recall of the model as it is, by rank 0 alone; the others wait.

    Where every rank has only a part of each weight, all embed, since each needs the others' parts.
    """
    if run.validate is None:
        return
    clip: CLIP = run.engine.module.clip
    if run.journal.writes or run.engine.zero_optimization_partition_weights():
        clip.eval()
        with gathered(clip.text_projection, clip.logit_scale):
            recalls = run.validate(clip)
        clip.train()
        if run.journal.writes:
            run.journal.recalls(step, recalls)
    dist.barrier()


def save(run: Run, step: int) -> None:
    """A checkpoint, put together by all ranks and written by rank 0."""
    state = checkpoint.gather_state(run.engine, step)
    if run.journal.writes:
        run.journal.flush()
        checkpoint.save(
            checkpoints_folder(run.folder),
            state,
            run.identity,
            run.journal.metrics_path,
            keep=run.config.keep_checkpoints,
        )
    dist.barrier()


def refuse_non_finite(run: Run, batch: Batch, loss: float) -> None:
    """Stop at a loss that is not finite: the weights are still those of the step before."""
    if math.isfinite(loss):
        return
    keys = [key.decode() for key in batch.keys.tolist()]
    path = os.path.join(run.folder, f"not_finite_step_{batch.step + 1}_rank_{dist.get_rank()}.json")
    found = {"step": batch.step + 1, "loss": str(loss), "keys": keys}
    store.write_text(path, json.dumps(found))
    # The file of every rank has to be there before the first error ends all of them.
    dist.barrier()
    raise InputError(
        f"[{run.stage}] the loss is {loss} at step {batch.step + 1}; rank {dist.get_rank()} had the samples"
        f" {', '.join(keys[:3])}, … (all {len(keys)} in {path});"
        " lower peak_learning_rate or lengthen warmup_steps, or look at these samples"
    )


def checkpoints_folder(folder: str) -> str:
    """Where a stage's checkpoints are."""
    return os.path.join(folder, "checkpoints")


def temperature(run: Run) -> float:
    """The factor on cosine similarities; a collective."""
    scale: float = logit_scale(run.engine).exp().item()
    return scale


class Journal:
    """What rank 0 writes of a run; other ranks write nothing.

    `metrics.jsonl` holds no times, so that a run that was killed and resumed writes the same bytes as one
    that was not. `log.jsonl` holds the speed.
    """

    def __init__(self, folder: str, *, writes: bool, total_steps: int, global_batch: int) -> None:
        self.writes = writes
        self.metrics_path = os.path.join(folder, "metrics.jsonl")
        self._log_path = os.path.join(folder, "log.jsonl")
        self._total_steps, self._global_batch = total_steps, global_batch
        self._last_line, self._last_progress = time.monotonic(), 0.0
        self._last_wait_seconds = 0.0

    def start_at(self, resumed: checkpoint.Checkpoint | None) -> None:
        """Take the metrics back to a checkpoint's, or to none."""
        if not self.writes:
            return
        data = b"" if resumed is None else store.read_bytes(resumed.metrics_path)
        store.write_bytes(self.metrics_path, data)
        self._metrics = open(self.metrics_path, "a", encoding="utf-8")  # noqa: SIM115
        self._log = open(self._log_path, "a", encoding="utf-8")  # noqa: SIM115

    def step(
        self, step: int, loss: float, temperature: float, learning_rate: float, wait_seconds: float
    ) -> None:
        if not self.writes:
            return
        values = {"loss": loss, "temperature": temperature, "learning_rate": learning_rate}
        self._write_metrics(step, values)
        now = time.monotonic()
        seconds, self._last_line = now - self._last_line, now
        waited, self._last_wait_seconds = wait_seconds - self._last_wait_seconds, wait_seconds
        samples_per_second = self._global_batch / seconds
        line = {
            "time": time.time(),
            "step": step,
            "seconds": round(seconds, 4),
            "data_wait_seconds": round(waited, 4),
            "samples_per_second": round(samples_per_second, 1),
        }
        self._log.write(json.dumps(line) + "\n")
        if now - self._last_progress >= _SECONDS_BETWEEN_PROGRESS or step == self._total_steps:
            self._last_progress = now
            self._log.flush()
            text = f"loss {loss:.3f} · {samples_per_second:.0f} samples/s"
            progress = {"done": step, "total": self._total_steps, "text": text}
            print(f"@progress {json.dumps(progress, ensure_ascii=False)}", flush=True)

    def recalls(self, step: int, recalls: Recalls) -> None:
        for name, recall in recalls.items():
            self._write_metrics(step, {"evaluation": name, "recall": recall})
        self.flush()
        self._last_line = time.monotonic()  # validation is not part of the next step's time

    def flush(self) -> None:
        if self.writes:
            self._metrics.flush()
            self._log.flush()

    def _write_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        line = {"step": step, "samples_seen": step * self._global_batch, **values}
        self._metrics.write(json.dumps(line, ensure_ascii=False) + "\n")
