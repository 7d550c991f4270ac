"""Killed runs resume with the same result, and one command at a time works in a run."""

import fcntl
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from pipeline.core import store
from pipeline.core.records import InputError
from pipeline.core.run import State, read_manifest, survey
from tests.helpers.number_stages import NUM_FILES, EvenConfig, execute, manifests, number_run, states


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder"])
def test_the_lock_is_a_plain_file(numbers: Path, tmp_path: Path, kind: str) -> None:
    run, elsewhere = number_run(numbers, tmp_path / "run"), tmp_path / "elsewhere"
    lock = Path(run.folder, ".lock")
    lock.parent.mkdir()
    if kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.write_text("precious")
    with pytest.raises(InputError, match=r"\.lock: a link or not a regular file, .*; remove it"):
        execute(run)
    assert elsewhere.exists() == (kind == "link")
    assert kind != "link" or elsewhere.read_text() == "precious"


def test_one_run_at_a_time(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run")
    os.makedirs(run.folder)
    with open(os.path.join(run.folder, ".lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another command is at work here"):
            execute(run)
    assert states(run) == [State.TO_DO, State.TO_DO]
    assert execute(run) == 2


@pytest.mark.parametrize("task", ["00000", "00002"])
def test_a_killed_run_resumes_to_the_same_manifests(numbers: Path, tmp_path: Path, task: str) -> None:
    whole = number_run(numbers, tmp_path / "whole")
    execute(whole)
    killed = number_run(numbers, tmp_path / "killed", EvenConfig(kill_in=task))
    process = multiprocessing.get_context("fork").Process(target=execute, args=(killed,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert read_manifest(killed, "even") is None
    assert not store.exists(store.join(killed.folder, "even", f"{task}.txt"))
    journal = tmp_path / "journal"
    again = number_run(numbers, tmp_path / "killed", EvenConfig(journal=str(journal)))
    assert survey(again)[1].tasks_done == int(task)
    assert execute(again) == 1
    assert len(journal.read_text().split()) == NUM_FILES - int(task)
    assert manifests(again) == manifests(whole)


def test_a_killed_worker_process_is_said_in_one_line(numbers: Path, tmp_path: Path) -> None:
    run = number_run(numbers, tmp_path / "run", EvenConfig(kill_in="00001"), processes=2)
    with pytest.raises(InputError, match="a worker process was killed") as caught:
        execute(run)
    assert "\n" not in str(caught.value)
    whole = number_run(numbers, tmp_path / "whole")
    execute(whole)
    again = number_run(numbers, tmp_path / "run", processes=2)
    execute(again)
    assert manifests(again) == manifests(whole)
