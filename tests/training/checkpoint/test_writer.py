"""Checkpoints that a thread writes while training continues: of their own step, whole or absent."""

import errno
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.launched_jobs import outputs
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import make_job, train_rank
from training.checkpoint import checkpoint
from training.checkpoint.checkpoint import TrainState
from training.checkpoint.host_memory import HostMemory
from training.checkpoint.writer import CheckpointWriter
from training.config.job import TrainJob


def files_of(job: TrainJob, step: int) -> dict[str, str]:
    """The sha256 of each file of a checkpoint."""
    path = Path(job.folder) / "checkpoints" / f"step_{step:09d}" / "state.json"
    found: dict[str, str] = json.loads(path.read_text())["sha256"]
    return found


def train_with_a_slow_disk(job: TrainJob) -> None:
    """Train where step 3's checkpoint is written when step 5 begins, and a kill cuts step 6's off."""
    from training import trainer as loop
    from training.engine.engine import StepResult, train_step

    write, save = checkpoint.save_file, checkpoint.save
    fifth_begins, half_written = threading.Event(), threading.Event()

    def late(root: str, state: TrainState, *arguments: Any, **named: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert fifth_begins.wait(60)
        save(root, state, *arguments, **named)

    def stuck(tensors: dict[str, torch.Tensor], path: str) -> None:
        write(tensors, path)
        if "step_000000006" in path:
            half_written.set()
            threading.Event().wait()

    def killed(engine: Any, batch: Any, *arguments: Any) -> StepResult:
        if batch.step + 1 == 5:
            fifth_begins.set()
        if batch.step + 1 == 8:
            assert os.environ["RANK"] != "0" or half_written.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(engine, batch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", late)
        patch.setattr(checkpoint, "save_file", stuck)
        patch.setattr(loop, "train_step", killed)
        train_rank(job)


def test_killed_while_the_thread_writes_it_resumes_from_the_one_before_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    # At ZeRO 0 with batch norms nothing that is saved is a copy by itself.
    changes: dict[str, Any] = {"model": "small-rn", "ranks": 2, "deepspeed": "zero0", "epochs": 3}
    whole, killed = (make_job(tmp_path, run, **changes) for run in ("whole", "killed"))
    run_ranks(train_rank, 2, whole)
    with pytest.raises(AssertionError, match="the rank died"):
        run_ranks(train_with_a_slow_disk, 2, killed)
    found = sorted(path.name for path in (Path(killed.folder) / "checkpoints").iterdir())
    assert found == [".step_000000006.partial", "step_000000003"]
    assert files_of(killed, 3) == files_of(whole, 3)
    run_ranks(train_rank, 2, killed)
    assert outputs(killed) == outputs(whole)
    assert files_of(killed, 6) == files_of(whole, 6)


def train_with_a_full_disk(job: TrainJob) -> None:
    """Train where the disk is full at step 6."""
    write = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: str) -> None:
        if "step_000000006" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        train_rank(job)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", ranks=2, epochs=50)  # far more steps than a failure goes unnoticed
    with pytest.raises(
        AssertionError, match=r"InputError: .*step_000000006: cannot write the checkpoint: .*No space left"
    ):
        run_ranks(train_with_a_full_disk, 2, job)
    found, damage = checkpoint.find_newest(str(Path(job.folder) / "checkpoints"), saved_identity(job, 3))
    assert found is not None
    assert (found.step, damage) == (3, {})
    assert len((Path(job.folder) / "metrics.jsonl").read_text().splitlines()) < 20


def saved_identity(job: TrainJob, step: int) -> dict[str, Any]:
    path = Path(job.folder) / "checkpoints" / f"step_{step:09d}" / "state.json"
    identity: dict[str, Any] = json.loads(path.read_text())["identity"]
    return identity


def test_the_end_waits_and_says_what_failed() -> None:
    may_end = threading.Event()

    def fail() -> None:
        may_end.wait()
        raise OSError("the disk is gone")

    with CheckpointWriter() as writer:
        writer.start(fail)
        writer.check()  # nothing has failed yet
        may_end.set()
        with pytest.raises(OSError, match="the disk is gone"):
            writer.wait()
        writer.wait()
        writer.check()  # it is said once


def test_copies_keep_their_place_and_their_values() -> None:
    memory = HostMemory()
    weights = {
        "scale": torch.tensor([0.5]),
        "count": torch.tensor(3),
        "turned": torch.arange(6.0).view(2, 3).T,
        "half": torch.ones(5, dtype=torch.bfloat16),
    }
    copies = {name: memory.copy(name, tensor) for name, tensor in weights.items()}
    memory.wait()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    for tensor in weights.values():
        tensor.zero_()
    for name, copy in copies.items():
        assert copy.is_contiguous()
        assert (copy.dtype, copy.data_ptr() % 64) == (before[name].dtype, 0)
        assert torch.equal(copy, before[name])
        assert memory.copy(name, weights[name]).data_ptr() == copy.data_ptr()
        assert not copy.any()
    memory.close()
