"""Training jobs started as users start them: by a launcher, in separate processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.rank_processes import free_port
from training.config.job import TrainJob

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
LIMIT_SECONDS = 600  # far more than any of these takes by itself; the machine may be busy


def read_metrics(job: TrainJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(job.folder) / "metrics.jsonl").read_text().splitlines()]


def losses(job: TrainJob) -> list[float]:
    return [line["loss"] for line in read_metrics(job) if "loss" in line]


def outputs(job: TrainJob) -> tuple[bytes, bytes]:
    return Path(job.output_model).read_bytes(), (Path(job.folder) / "metrics.jsonl").read_bytes()


def launch(job: TrainJob) -> subprocess.Popen[str]:
    """Start the real launcher on this machine, in a separate process group."""
    path = Path(job.folder) / "job.json"
    path.write_text(job.to_json())
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(job.config.ranks)]
    command += ["--master_port", str(free_port()), str(HELPERS / "rank_main.py"), str(path)]
    python_path = str(ROOT)
    environment = os.environ | {"PYTHONPATH": python_path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_watched(job: TrainJob, entry: str = "tests.helpers.rank_main") -> subprocess.Popen[str]:
    """Start the ranks, each as module `entry`, like `cnclip run`; the caller must read their output."""
    path = Path(job.folder) / "job.json"
    path.write_text(job.to_json())
    words = [sys.executable, str(HELPERS / "watch_main.py"), str(path), entry]
    python_path = str(ROOT)
    environment = os.environ | {"PYTHONPATH": python_path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)


def wait_for_steps(job: TrainJob, process: subprocess.Popen[str], count: int) -> None:
    """Wait until training took so many steps; fail at once if the process that trains has ended."""
    log, end = Path(job.folder) / "log.jsonl", time.monotonic() + LIMIT_SECONDS
    while not log.exists() or log.read_text().count('"samples_per_second"') < count:
        if process.poll() is not None:
            said = process.stdout.read() if process.stdout is not None else ""
            raise AssertionError(f"ended with {process.returncode} before step {count}: {said[-2000:]}")
        assert time.monotonic() < end
        time.sleep(0.1)


def ranks_of(launcher_pid: int) -> list[tuple[int, str]]:
    """Return (process, its environment) of every rank below a launcher."""

    return [
        (child.pid, " ".join(f"{key}={value}" for key, value in child.environ().items()))
        for child in psutil.Process(launcher_pid).children(recursive=True)
        if "rank_main" in " ".join(child.cmdline()) and "launcher" not in " ".join(child.cmdline())
    ]
