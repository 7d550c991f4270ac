"""Every call of the store fails once: one line says so, and the next start ends with the same bytes."""

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.core.files import durability
from tests.helpers.faulty_disk import KINDS, FaultyDisk
from tests.helpers.small_run import SmallRun

SAMPLE = 10  # calls of each scenario in the ordinary tests
_REDO = ("--set=filter_text.max_characters=12", "--redo")


def _os_error(number: int) -> Callable[[], BaseException]:
    return lambda: OSError(number, os.strerror(number))


ERRORS: dict[str, Callable[[], BaseException]] = {
    "ENOSPC": _os_error(errno.ENOSPC),
    "EIO": _os_error(errno.EIO),
    "EINTR": _os_error(errno.EINTR),
    "MemoryError": MemoryError,
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command on a run in some state."""

    run: SmallRun
    start: Path | None  # what its folder holds at the start; None: nothing
    words: tuple[str, ...]
    whole: dict[str, bytes]  # what it ends with

    def prepare(self) -> None:
        self.run.clear()
        durability.forget_folders()
        if self.start is not None:
            shutil.copytree(self.start, self.run.folder)

    def calls(self) -> list[tuple[str, int]]:
        """All calls of the command when none fails: kind and number."""
        self.prepare()
        disk = FaultyDisk(self.run.folder)
        with disk.failing():
            assert self.run.command("run", *self.words).status == 0
        assert self.run.files() == self.whole
        return [(kind, number) for kind in KINDS for number in range(1, disk.calls[kind] + 1)]

    def fail(self, kind: str, number: int, name: str) -> bool:
        """Run with one fault, then without; returns whether the fault ended the first."""
        where = f"{' '.join(('run', *self.words))}: {kind} no. {number}: {name}"
        self.prepare()
        with FaultyDisk(self.run.folder).failing(kind, number, ERRORS[name]()):
            first = self.run.command("run", *self.words)
        if first.status != 0:
            lines = [line for line in first.error.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1, f"{where}: {first.error}"
            assert first.error.endswith(lines[0] + "\n"), f"{where}: {first.error}"
        else:
            assert self.run.files() == self.whole, where
        again = self.run.command("run", *self.words)
        assert again.status == 0, f"{where}: the next start: {again.error}"
        assert self.run.files() == self.whole, f"{where}: the next start"
        return first.status != 0


@pytest.fixture(autouse=True)
def nothing_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is seen without a disk that waits."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module", params=["run", "redo", "repair"])
def scenario(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    folder = tmp_path_factory.mktemp(request.param)
    run = SmallRun(folder)
    assert run.command().status == 0
    whole, start = run.files(), folder / "start"
    if request.param == "run":
        return Scenario(run, None, (), whole)
    if request.param == "redo":
        shutil.copytree(run.folder, start)
        assert run.command("run", *_REDO).status == 0
        assert run.files() != whole
        return Scenario(run, start, _REDO, run.files())
    table = run.folder / "filter_text" / "kept" / "00001.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    (run.folder / "corpus" / "manifest.json").write_bytes(b"{")
    shutil.copytree(run.folder, start)
    return Scenario(run, start, ("--repair",), whole)


def test_one_failed_call_is_one_line_and_the_next_start_ends_with_the_same_bytes(scenario: Scenario) -> None:
    calls = scenario.calls()
    draw = random.Random(0)
    sample = draw.sample(calls, SAMPLE)
    seen = [scenario.fail(kind, number, draw.choice(list(ERRORS))) for kind, number in sample]
    assert sum(seen) > SAMPLE // 5  # a task is tried three times, so one fault in it ends nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_every_call_fails_once(scenario: Scenario, name: str) -> None:
    calls = scenario.calls()
    assert {kind for kind, _ in calls} >= {"open", "read", "write", "fsync", "rename", "mkdir"}
    seen = [scenario.fail(kind, number, name) for kind, number in calls]
    assert sum(seen) > len(seen) // 5


@pytest.mark.parametrize(
    "step", [pytest.param(11, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)
def test_allocations_of_the_store_fail_once(tmp_path: Path, step: int) -> None:
    pytest.importorskip("_testcapi", reason="this Python comes without its own tests")
    command = [sys.executable, "-m", "tests.helpers.store_allocations", str(tmp_path / "run"), str(step)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=root)
    assert ended.returncode == 0, ended.stderr[-2000:]
    counts = [int(line.rpartition(": ")[2]) for line in ended.stdout.splitlines()]
    assert len(counts) == 13
    assert all(counts), ended.stdout
