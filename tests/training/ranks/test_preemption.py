"""Stopped at any step by a signal, gone on with other ranks and micro-batches: the same samples and run."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline.core.records import Stopped
from tests.helpers.launched_jobs import (
    LIMIT_SECONDS,
    ROOT,
    launch,
    losses,
    outputs,
    ranks_of,
    run_watched,
    wait_for_steps,
)
from tests.helpers.rank_processes import run_ranks
from tests.helpers.train_jobs import make_job, train_rank
from training.config.job import TrainJob
from training.ranks import launcher
from training.ranks.launcher import launcher_environment, watch


def train_and_note_keys(job: TrainJob, stop: tuple[int, int] | None = None) -> list[list[str]]:
    """Train without dropout; return the keys of the rank's part of each step.

    `stop`: the signal reaches only rank 0, in the first of these steps, and training ends after the second.
    """
    from training import trainer as loop
    from training.engine.engine import StepResult, train_step

    found = []

    def noted(engine: Any, batch: Any, *arguments: Any) -> StepResult:
        found.append([key.decode() for key in batch.keys.tolist()])
        if stop is not None and batch.step + 1 == stop[0] and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(engine, batch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", noted)
        if stop is None:
            train_rank(job, dropout=0.0)
        else:
            with pytest.raises(Stopped, match=f"by SIGTERM after step {stop[1]}"):
                train_rank(job, dropout=0.0)
    return found


def joined(of_ranks: list[list[list[str]]]) -> list[list[str]]:
    """Keys of every step over all ranks, in order."""
    return [[key for part in parts for key in part] for parts in zip(*of_ranks, strict=True)]


@pytest.mark.slow
def test_stopped_at_any_step_and_on_any_ranks_it_sees_the_same_samples(tmp_path: Path) -> None:
    whole = make_job(tmp_path, "whole", save_every_steps=1000, epochs=3)
    expected = joined(run_ranks(train_and_note_keys, 1, whole))
    assert len(expected) == 9
    stopped = make_job(tmp_path, "stopped", save_every_steps=1000, epochs=3)
    seen = []
    # A signal is known when the next step has begun, or if something follows the step: after 4, a validation.
    stops = ((1, None, (1, 2)), (2, 3, (4, 4)), (4, None, (6, 7)), (1, 5, None))
    for ranks, micro_batch, stop in stops:
        changed = dataclasses.replace(stopped.config, ranks=ranks, micro_batch=micro_batch)
        part = dataclasses.replace(stopped, config=changed)
        seen += joined(run_ranks(train_and_note_keys, ranks, part, stop))
        if stop is not None:
            newest = max((Path(stopped.folder) / "checkpoints").iterdir())
            assert newest.name == f"step_{stop[1]:09d}"
            assert not Path(stopped.output_model).exists()
    assert seen == expected
    np.testing.assert_allclose(losses(stopped), losses(whole), atol=1e-4)


def test_stopped_and_gone_on_the_same_way_gives_the_same_bytes(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": "small-rn", "ranks": 2, "micro_batch": 3, "save_every_steps": 1000}
    whole, stopped = (make_job(tmp_path, run, **changes) for run in ("whole", "stopped"))
    run_ranks(train_and_note_keys, 2, whole)
    # step 4 is validated: the stop comes before that, and the next start makes up for it
    run_ranks(train_and_note_keys, 2, stopped, (4, 4))
    run_ranks(train_and_note_keys, 2, stopped)
    assert outputs(stopped) == outputs(whole)


@pytest.mark.slow
def test_the_launcher_passes_a_signal_on_and_says_that_it_was_stopped(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", ranks=2, epochs=2000, save_every_steps=100_000)
    with run_watched(job) as process:
        wait_for_steps(job, process, 3)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == Stopped.exit_status
    assert re.search(r"stopped: by SIGTERM after step \d+, a checkpoint is written; rerun the same", said)
    newest = max((Path(job.folder) / "checkpoints").iterdir())  # next to that of the warm-up's end
    step = json.loads((newest / "state.json").read_text())["step"]
    assert step >= 3
    assert f"by SIGTERM after step {step}" in (Path(job.folder) / "train.log").read_text()


def test_a_second_interrupt_does_not_wait_for_the_ranks(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run")
    started = Path(job.folder) / "rank"
    with run_watched(job, "tests.helpers.deaf_rank") as process:
        end = time.monotonic() + LIMIT_SECONDS
        while not started.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        rank = int(started.read_text())
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT_SECONDS / 10)
    assert process.returncode == -signal.SIGINT
    end = time.monotonic() + LIMIT_SECONDS
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(rank).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_a_signal_that_comes_before_there_are_ranks_is_not_lost(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", epochs=2000, save_every_steps=100_000)
    with run_watched(job) as process:
        end = time.monotonic() + LIMIT_SECONDS
        while not (launchers := psutil.Process(process.pid).children()):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert not launchers[0].children()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == Stopped.exit_status
    assert "stopped: no rank was training; rerun the same command to resume" in said


def wait_for_another(job: TrainJob, errors: str) -> None:
    """Be the first of two ranks, the second of which never comes; `errors` takes standard error."""
    os.environ |= {"LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    with open(errors, "wb") as file:
        os.dup2(file.fileno(), 2)
    train_rank(job)


def test_a_rank_that_waits_for_another_to_come_ends_too(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", ranks=2, stall_seconds=0.25)  # 8 times that between steps
    with pytest.raises(AssertionError, match="the rank died"):
        run_ranks(wait_for_another, 1, job, str(tmp_path / "errors"))
    said = (tmp_path / "errors").read_text()
    assert "no sign of life for 2 s; rank 0: starting; rank 1: no response" in said


@pytest.mark.parametrize("is_full", [False, True])
def test_the_watchdog_ends_a_rank_also_on_a_full_disk(tmp_path: Path, is_full: bool) -> None:
    program = (
        "import resource, time; from training.ranks.watchdog import Watchdog;"
        f" {'resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0));' if is_full else ''}"
        f" Watchdog({str(tmp_path)!r}, stage='stage1', rank=0, ranks=1, limit_seconds=0.05);"
        f" time.sleep({LIMIT_SECONDS})"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=ROOT)
    assert ended.returncode == 1
    assert "error: [stage1] no sign of life for 0.4 s" in ended.stderr


def train_and_be_told_to_stop_afterwards(job: TrainJob) -> bool:
    train_rank(job, dropout=0.0)
    os.kill(os.getpid(), signal.SIGUSR1)  # it would end a process that does not listen
    return signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN  # so that Python, shutting down, leaves it so


def test_a_signal_after_the_last_step_does_not_end_a_rank(tmp_path: Path) -> None:
    job = make_job(tmp_path, "run", save_every_steps=1000)
    assert run_ranks(train_and_be_told_to_stop_afterwards, 1, job) == [True]
    assert Path(job.output_model).exists()


@pytest.mark.parametrize("has_device", [False, True])
def test_a_gpu_is_not_overlooked_where_no_tool_lists_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_device: bool
) -> None:
    device = tmp_path / "nvidiactl"
    if has_device:
        device.touch()
    monkeypatch.setattr(launcher, "_GPU_DEVICES", (str(device),))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launcher_environment({}, 1).get("DS_ACCELERATOR") == (None if has_device else "cpu")
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert "DS_ACCELERATOR" not in launcher_environment({}, 1)


def test_a_signal_to_a_launcher_whose_ranks_are_done_stops_the_run_all_the_same(tmp_path: Path) -> None:
    rank = (
        "import signal, time; from pathlib import Path; signal.signal(signal.SIGUSR1, signal.SIG_IGN);"
        f" Path({str(tmp_path / 'done')!r}).touch();"
        f" [time.sleep(0.05) for _ in iter(lambda: Path({str(tmp_path / 'end')!r}).exists(), True)]"
    )
    launcher = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {rank!r}]))"

    def tell() -> None:
        while not (tmp_path / "done").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        (tmp_path / "end").touch()

    threading.Thread(target=tell).start()
    log_path = str(tmp_path / "train.log")
    with pytest.raises(Stopped, match="training is finished; rerun the same command to resume"):
        watch([sys.executable, "-c", launcher], dict(os.environ), log_path, lambda *_: None, print)


# DeepSpeed's launcher waits half a minute for a stopped rank before it kills it.
@pytest.mark.slow
@pytest.mark.parametrize("waits", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_ends_the_run_and_is_named(tmp_path: Path, waits: bool) -> None:
    never = {"save_every_steps": 10**9, "validate_every_steps": 10**9}
    job = make_job(tmp_path, "run", ranks=2, epochs=100_000, stall_seconds=8.0, **never)
    process = launch(job)
    try:
        wait_for_steps(job, process, 5)  # past the checkpoint at the end of the warm-up
        (rank,) = [found for found in ranks_of(process.pid) if "LOCAL_RANK=1" in found[1]]
        os.kill(rank[0], signal.SIGSTOP)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("error: ") and not waits:
                os.kill(rank[0], signal.SIGKILL)
        output = "".join(lines)
        process.wait(timeout=120)
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    (said,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "no sign of life for 8 s; rank 0: computing step" in said
    assert "rank 1: no response; the process is stopped or dead" in said
    assert "training/trainer.py" in output  # where rank 0 stands
