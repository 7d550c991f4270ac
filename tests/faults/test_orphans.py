"""A run that is killed in the very moment its children start leaves none of them behind."""

import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.helpers.hanging_run import hanging_run

_MARK = "CNCLIP_TEST_FAMILY"  # in the environment of a run and of all that descends from it
_WITHIN_SECONDS = 20.0  # a spawned child looks around only after Python and its imports have started

# Two workers of a stage, each with a task that never ends.
_WORKERS = """
import sys, time
from pipeline import runner
from pipeline.core.run import Run
from pipeline.core.stage import Stage, Task

def plan(config, context):
    return [Task(str(number), {}) for number in range(2)]

def work(config, context, task, progress):
    time.sleep(3600)

if __name__ == "__main__":
    stage = Stage("endless", "", 1, None, (), plan, work)
    runner.execute(Run(sys.argv[1], 0, "local", 2, (stage,)), [stage], redo=False)
"""

# Two ranks behind DeepSpeed's launcher, which wait for ever for the rest of their job's file.
_RANKS = """
import os, sys
from training.ranks.launcher import free_port, launcher_command, launcher_environment, watch

os.mkfifo(sys.argv[1] + ".json")
port = free_port()
command = launcher_command("local", "pipeline.rank", sys.argv[1] + ".json", ranks=2, port=port)
watch(command, launcher_environment(os.environ, 1), sys.argv[1] + ".log", print, print)
"""


def _family(mark: str) -> list[psutil.Process]:
    """All living processes with the mark: the run and its descendants, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue  # gone meanwhile, or another user's
    return found


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _left_by_a_kill(command: Sequence[str], sign: str, number: int, wait_seconds: float) -> list[str]:
    """Kill a run once `number` of its children have `sign` in their command lines; return who lives on."""
    mark = uuid.uuid4().hex
    quiet = subprocess.DEVNULL
    run = subprocess.Popen(command, env={**os.environ, _MARK: mark}, stdout=quiet, stderr=quiet)
    try:
        end = time.monotonic() + 120
        while sum(sign in _words(process) for process in psutil.Process(run.pid).children(True)) < number:
            assert run.poll() is None, "it ended before its children were seen"
            assert time.monotonic() < end, "no child was seen"
            time.sleep(0.001)
        time.sleep(wait_seconds)
    finally:
        run.kill()
        run.wait()
    end = time.monotonic() + _WITHIN_SECONDS
    while (left := _family(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    words = [f"{process.pid}: {_words(process)}" for process in left]
    for process in left:
        process.kill()
    return words


def _kill_often(command: Sequence[str], sign: str, number: int, waits: Sequence[float]) -> None:
    for wait_seconds in waits:
        left = _left_by_a_kill(
            [word.format(uuid.uuid4().hex) for word in command], sign, number, wait_seconds
        )
        assert left == [], f"killed {wait_seconds:.3f} s after the first sight"


def _workers(folder: Path) -> list[str]:
    program = folder / "endless.py"
    program.write_text(_WORKERS)
    return [sys.executable, str(program), f"{folder}/{{}}"]


def _ranks(folder: Path) -> list[str]:
    program = folder / "ranks.py"
    program.write_text(_RANKS)
    return [sys.executable, str(program), f"{folder}/{{}}"]


def _random_waits(number: int) -> list[float]:
    draw = random.Random(0)
    return [0.0, *(draw.uniform(0, 2) ** 2 for _ in range(number - 1))]


def test_no_worker_outlives_its_run(tmp_path: Path) -> None:
    _kill_often(_workers(tmp_path), "spawn_main", 1, [0.0])
    _kill_often(_workers(tmp_path), "spawn_main", 2, [0.02])


def test_no_rank_outlives_its_run(tmp_path: Path) -> None:
    _kill_often(_ranks(tmp_path), "pipeline.rank --local_rank", 1, [0.0])


def test_no_launcher_outlives_its_run(tmp_path: Path) -> None:
    _kill_often(_ranks(tmp_path), "training.ranks.deepspeed_launch", 1, [0.0])


@pytest.mark.parametrize("sign", ["data_prep.download.worker", "spawn_main"])
def test_no_download_outlives_its_run(tmp_path: Path, sign: str) -> None:
    with hanging_run(tmp_path) as (run, _):
        _kill_often([sys.executable, "-m", "pipeline", "run", run], sign, 1, [0.0])


@pytest.mark.slow
def test_no_child_outlives_its_run_however_late_it_is_killed(tmp_path: Path) -> None:
    _kill_often(_workers(tmp_path), "spawn_main", 1, _random_waits(20))
    _kill_often(_ranks(tmp_path), "training.ranks.deepspeed_launch", 1, _random_waits(10))
    _kill_often(_ranks(tmp_path), "pipeline.rank --local_rank", 1, _random_waits(10))
    with hanging_run(tmp_path) as (run, _):
        _kill_often([sys.executable, "-m", "pipeline", "run", run], "spawn_main", 1, _random_waits(5))
