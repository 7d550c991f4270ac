"""What all benchmarks share: records, rounds in turn, options, and both ways to start a script."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import harness

ROOT = Path(__file__).parents[2]
KEYS = ["name", "ours", "peer", "unit", "ratio", "equal", "machine"]


def test_a_ratio_above_one_means_that_ours_is_better() -> None:
    seconds = harness.record("step", ours=2.0, peer=3.0, unit="CPU s")
    rate = harness.record("step", ours=3.0, peer=2.0, unit="images/CPU s")
    assert list(seconds) == list(rate) == KEYS
    assert seconds["ratio"] == rate["ratio"] == 1.5


def test_a_result_without_a_peer_has_no_ratio() -> None:
    found = harness.record("keys", 24_538_842.4, None, "rows/CPU s", rows=10)
    assert (found["ours"], found["peer"], found["ratio"], found["rows"]) == (24_538_842, None, None, 10)


def test_sides_take_turns() -> None:
    called: list[str] = []
    clock = itertools.count().__next__
    taken = harness.in_turns(
        {"ours": lambda: called.append("ours"), "peer": lambda: called.append("peer")},
        2,
        clock=lambda: float(clock()),
        after=lambda side: called.append(f"after {side}"),
    )
    assert called == ["ours", "after ours", "peer", "after peer"] * 2
    assert harness.medians(taken) == {"ours": 1.0, "peer": 1.0}


@pytest.mark.parametrize(
    ("arguments", "rounds"), [([], 3), (["--full"], 9), (["--full", "--rounds", "5"], 5)]
)
def test_rounds(monkeypatch: pytest.MonkeyPatch, arguments: list[str], rounds: int) -> None:
    monkeypatch.setattr(sys, "argv", ["loss.py", *arguments])
    assert harness.parse(harness.parser("Measure.", rounds=(3, 9))).rounds == rounds


@pytest.mark.parametrize(("equal", "status"), [(True, 0), (False, 1)])
def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str], equal: bool, status: int) -> None:
    found = harness.record("loss", 1.0, 2.0, "s", equal=equal)
    assert harness.report([found]) == status
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == [found]


@pytest.mark.parametrize("start", [["benchmarks/eval/features_io.py"], ["-m", "benchmarks.eval.features_io"]])
def test_a_script_starts_by_its_path_and_as_a_module(start: list[str]) -> None:
    command = [sys.executable, *start, "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--full" in shown
