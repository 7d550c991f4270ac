"""What a Slurm script does around its command, in a bash without Slurm: which ends put the job back."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.launch.slurm import requeued
from tests.helpers.hanging_run import hanging_run

LIMIT_SECONDS = 60


def end_of(
    folder: Path, command: str, setup: Sequence[str] = (), *, stop_when: Callable[[], bool] | None = None
) -> tuple[int, str]:
    """(status of the script, what it had `scontrol` do), SIGTERM sent to the script at some moment."""
    fake = folder / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/bash\nsleep 0.2\necho "$@" >> {folder}/asked\n')
    fake.chmod(0o755)
    environment = os.environ | {"SLURM_JOB_ID": "17", "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", "-c", "\n".join(requeued(command, setup))], env=environment) as script:
        if stop_when is not None:
            end = time.monotonic() + LIMIT_SECONDS
            while not stop_when():
                assert script.poll() is None
                assert time.monotonic() < end
                time.sleep(0.02)
            script.send_signal(signal.SIGTERM)
        status = script.wait(LIMIT_SECONDS)
    asked = folder / "asked"
    return status, asked.read_text().strip() if asked.exists() else ""


@pytest.mark.parametrize(
    ("command", "expected"),
    [("exit 0", (0, "")), ("exit 3", (3, "")), ("exit 143", (143, "requeue 17"))],
)
def test_a_job_goes_back_where_its_command_was_stopped(
    tmp_path: Path, command: str, expected: tuple[int, str]
) -> None:
    assert end_of(tmp_path, f"bash -c '{command}'") == expected


@pytest.mark.parametrize("seconds", [0, 0.5])  # from the signal to the end
@pytest.mark.parametrize(
    ("last_words", "expected"), [("exit 143", (143, "requeue 17")), ("exit 0", (0, "")), ("exit 3", (3, ""))]
)
def test_the_script_passes_a_signal_on_and_waits_for_the_command(
    tmp_path: Path, last_words: str, expected: tuple[int, str], seconds: float
) -> None:
    heard, ready = tmp_path / "heard", tmp_path / "ready"
    ends = f"trap 'sleep {seconds}; touch {heard}; {last_words}' TERM"
    body = f"{ends}; touch {ready}; while :; do sleep 0.05; done"
    found = end_of(tmp_path, f"bash -c {shlex.quote(body)}", stop_when=ready.exists)
    assert heard.exists()
    assert found == expected


def test_a_signal_before_there_is_a_command_is_passed_on_to_it(tmp_path: Path) -> None:
    assert end_of(tmp_path, "sleep 60", ["set -euo pipefail", "kill -TERM $$"]) == (143, "requeue 17")


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_within_its_data_goes_back_into_the_queue(
    tmp_path: Path, executor: str
) -> None:
    if executor == "ray":
        pytest.importorskip("ray", reason="Ray is in the extra `ray`")
    with hanging_run(tmp_path) as (path, is_asked):
        words = ("run", path, "--to", "shards", "--set", f"run.executor={executor}")
        command = shlex.join([sys.executable, "-m", "pipeline", *words])
        found = end_of(tmp_path, command, stop_when=is_asked)
    assert found == (143, "requeue 17")
    assert (tmp_path / "run" / "dedup" / "manifest.json").exists()  # what is done is kept
