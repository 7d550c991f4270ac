"""What a run says of itself while it trains: what is not finite, what is slow, what died."""

import dataclasses
import json
import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.evaluation_files import small_evaluation
from tests.helpers.launched_jobs import (
    LIMIT_SECONDS,
    losses,
    ranks_of,
    read_metrics,
    run_watched,
    wait_for_steps,
)
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import make_job, train_rank
from training.config.job import TrainJob


def read_log(job: TrainJob) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of speed, and notices."""
    lines = [json.loads(line) for line in (Path(job.folder) / "log.jsonl").read_text().splitlines()]
    speed = [line for line in lines if "samples_per_second" in line]
    return speed, [line["notice"] for line in lines if "notice" in line]


def train_with_poison(job: TrainJob, steps: tuple[int, ...], what: str) -> list[str]:
    """Train where the batches of these steps give a loss or a gradient that is not finite; the running means.

    The gradient is poisoned only on rank 0, whose own part of the batch is to blame.
    """
    from training.engine import engine as engines
    from training.engine.towers import Features, Towers

    forward = Towers.forward
    now: dict[str, int] = {}

    def poisoned(self: Towers, *inputs: torch.Tensor) -> Features:
        features = forward(self, *inputs)
        text_BD = features.text_BD
        if now["step"] in steps and what == "loss":
            text_BD = text_BD * float("nan")
        if now["step"] in steps and what == "gradient" and os.environ["RANK"] == "0":
            text_BD.register_hook(lambda gradient: gradient * float("inf"))
        return features._replace(text_BD=text_BD)

    whole = engines.whole_batch

    def noted(engine: Any, batch: Any, seed: int) -> Any:
        now["step"] = batch.step + 1
        return whole(engine, batch, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Towers, "forward", poisoned)
        patch.setattr(engines, "whole_batch", noted)
        train_rank(job, dropout=0.0)
    return []


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(
    "deepspeed",
    ["zero0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3"))],
)
def test_a_batch_that_is_not_finite_is_left_out_and_named(tmp_path: Path, deepspeed: str, what: str) -> None:
    changes: dict[str, Any] = {"deepspeed": deepspeed, "ranks": 2, "on_non_finite": "skip", "epochs": 1}
    changes |= {"model": "small-rn", "save_every_steps": 2} if deepspeed != "zero3" else {}
    job = make_job(tmp_path, "run", **changes)
    run_ranks(train_with_poison, 2, job, (2,), what)
    steps = [line for line in read_metrics(job) if "evaluation" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert steps[1] == {"step": 2, "samples_seen": 32, "skipped": True}
    assert all(np.isfinite(losses(job)))
    weights = load_file(job.output_model)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    seen = [int(tensor) for name, tensor in weights.items() if name.endswith("num_batches_tracked")]
    assert set(seen) <= {2}  # batch norms forget the batch too
    assert bool(seen) == (deepspeed != "zero3")
    keys = []
    for rank in (0, 1):
        found = json.loads((Path(job.folder) / f"not_finite_step_2_rank_{rank}.json").read_text())
        keys += found["keys"]
        assert found["what"] == ("the loss is nan" if what == "loss" else "the gradient is not finite")
    assert len(keys) == len(set(keys)) == 16
    (said,) = read_log(job)[1]
    assert "at step 2: the batch is left out; rank 0 had the samples" in said


def test_a_gradient_that_is_not_finite_stops_where_nothing_else_is_said(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", epochs=1)
    with pytest.raises(AssertionError, match=r"InputError: \[stage2\] the gradient is not finite at step 2;"):
        run_ranks(train_with_poison, 1, job, (2,), "gradient")


def test_batches_are_not_left_out_for_ever(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", epochs=6, on_non_finite="skip")
    with pytest.raises(AssertionError, match=r"the loss is nan at step 14, 11 batches in a row; rank 0 had"):
        run_ranks(train_with_poison, 1, job, tuple(range(4, 19)), "loss")


def test_a_run_that_left_batches_out_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"on_non_finite": "skip", "model": "small-rn", "save_every_steps": 4}
    whole, again = (make_job(tmp_path, run, **changes) for run in ("whole", "again"))
    run_ranks(train_with_poison, 1, whole, (2,), "gradient")
    (Path(whole.folder) / "checkpoints").rename(Path(again.folder) / "checkpoints")
    run_ranks(train_with_poison, 1, again, (2,), "gradient")
    # Adam's bias correction counts updates, of which there is one less than steps.
    assert Path(again.output_model).read_bytes() == Path(whole.output_model).read_bytes()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", ranks=2, epochs=100_000)
    with run_watched(job) as process:
        wait_for_steps(job, process, 2)
        (rank,) = [pid for pid, environment in ranks_of(process.pid) if "LOCAL_RANK=1" in environment]
        launcher = psutil.Process(rank).parent()
        assert launcher is not None
        launcher.suspend()  # it takes what the kernel says of a dead rank, at a moment of its own choice
        os.kill(rank, signal.SIGKILL)
        time.sleep(1)
        launcher.resume()
        said, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode != 0
    assert f"error: rank 1 (process {rank}) was killed by SIGKILL and said nothing: most often" in said


def train_slowly(job: TrainJob, slow_rank: str) -> None:
    """Train where one rank's reader takes longer than a step."""
    from training.data.loader import BatchReader

    request = BatchReader.request

    def slow(self: BatchReader, step: int) -> Any:
        if os.environ["RANK"] == slow_rank:
            time.sleep(0.6)  # longer than a step takes on a busy machine, which hides as much
        return request(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchReader, "request", slow)
        train_rank(job)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_waiting_for_data_is_said_and_speed_is_written(tmp_path: Path, ranks: int) -> None:
    steps_alone = {"validate_every_steps": 0, "save_every_steps": 1000}
    job = make_job(tmp_path, "run", epochs=7, ranks=ranks, **steps_alone)
    run_ranks(train_slowly, ranks, job, str(ranks - 1))  # the last rank's wait is everybody's
    log, notices = read_log(job)
    assert len(notices) == 2  # once when it is sure, once at the end
    assert "% of the time of 21 steps went into waiting for data (more than 3 %)" in notices[1]
    assert len(log) == 21
    assert sum(line["data_wait_seconds"] for line in log[1:]) > 0.03 * sum(
        line["seconds"] for line in log[1:]
    )
    peaks = []
    for line in log:
        assert line["samples_per_second"] == pytest.approx(16 / line["seconds"], rel=0.05)
        assert 0 < line["utilisation"] < 1.5  # the peak is measured, and the machine may be busy
        peaks.append(line["teraflops"] / line["utilisation"])
    # rounded to four digits each
    assert np.median(peaks) == pytest.approx(peaks[-1], rel=0.2)


def test_a_full_disk_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", epochs=1)
    (Path(job.folder) / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        AssertionError, match=r"InputError: .*run: the curves and the log cannot be written \(No space left"
    ):
        run_ranks(train_rank, 1, job)


def test_the_curves_are_there_for_tensorboard(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", epochs=1)
    run_ranks(train_rank, 1, job)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(Path(job.folder) / "tensorboard"))
    found.Reload()
    assert {"train/loss", "train/temperature", "train/utilisation", "mean_recall/toy"} <= set(
        found.Tags()["scalars"]
    )
    shown = [(event.step, event.value) for event in found.Scalars("train/loss")]
    as_float32 = [struct.unpack("f", struct.pack("f", loss))[0] for loss in losses(job)]
    assert shown == [(step, loss) for step, loss in enumerate(as_float32, start=1)]


def copies_while_validating(job: TrainJob) -> list[int]:
    """How many token embeddings more there are at each encoding of texts in the real validation."""
    import gc

    from eval.features.evaluation_set import validator
    from tests.helpers.train_jobs import small_models
    from training.model.clip import CLIP
    from training.model.config import MODELS
    from training.model.tokenizer import Tokenizer
    from training.pretrain import pretrain

    MODELS.update(small_models())
    seen: list[int] = []
    before: list[int] = []
    encode_text = CLIP.encode_text

    def embeddings(shape: torch.Size) -> int:
        tensors = (item for item in gc.get_objects() if isinstance(item, torch.Tensor))
        return len({found.untyped_storage().data_ptr() for found in tensors if found.shape == shape})

    def counted(clip: CLIP, tokens_BL: torch.Tensor, **more: Any) -> torch.Tensor:
        if before and not clip.training:
            seen.append(embeddings(clip.bert.embeddings.word_embeddings.weight.shape) - before[-1])
        return encode_text(clip, tokens_BL, **more)

    validate = validator(job.evaluations, Tokenizer.load(job.vocabulary), job.config.context_length)

    def watched(clip: CLIP) -> Any:
        before.append(embeddings(clip.bert.embeddings.word_embeddings.weight.shape))
        return validate(clip)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIP, "encode_text", counted)
        pretrain(job, watched)
    return seen


def test_validation_holds_no_second_copy_of_the_model(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", epochs=1)
    job = dataclasses.replace(job, evaluations={"small": small_evaluation(tmp_path / "small")})
    (seen,) = run_ranks(copies_while_validating, 1, job)
    assert len(seen) == 2  # before the first step and after the last
    assert max(seen) == 0
    recalls = [line["recall"] for line in read_metrics(job) if "recall" in line]
    assert [set(recall) for recall in recalls] == [{"t2i", "i2t", "mean_recall"}] * 2
