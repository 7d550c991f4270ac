"""A power cut at any moment of a run: the next start ends with the same bytes, or refuses and names --repair.

A run is recorded call by call; every state that the disk may be in after a cut is put in its place, and the
run goes on from there.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from pipeline.core import store
from pipeline.core.files import durability
from tests.helpers.power import LOSSES, DiskState, PowerRecorder
from tests.helpers.small_run import SmallRun
from training.checkpoint import checkpoint
from training.checkpoint.checkpoint import TrainState

SAMPLE = 40  # of some 200 states
Recorded = tuple[SmallRun, dict[str, bytes], list[DiskState]]


@pytest.fixture(autouse=True)
def nothing_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that continues needs no disk that waits."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A small run, what it leaves, and the states that a power cut during it may leave."""
    run = SmallRun(tmp_path_factory.mktemp("power"))
    recorder = PowerRecorder(run.folder)
    recorder.record(lambda: run.command())
    whole = run.files()
    assert whole
    return run, whole, recorder.states


def go_on(run: SmallRun, whole: dict[str, bytes], state: DiskState) -> str:
    """Start the run again from a state of the disk; returns how it came to its end."""
    where = f"a cut before {state.before} (moment {state.moment}, {state.loss})"
    state.write(run.folder)
    durability.forget_folders()
    ended = run.command()
    how = "went on"
    if ended.status != 0:
        assert "--repair" in ended.error, f"{where}: {ended.error}"
        ended = run.command("run", "--repair")
        how = "repaired"
    assert ended.status == 0, f"{where}: {ended.error}"
    assert run.files() == whole, where
    return how


def test_a_run_goes_on_after_a_power_cut(recorded: Recorded) -> None:
    run, whole, states = recorded
    assert {state.loss for state in states} == set(LOSSES)
    found = Counter(go_on(run, whole, state) for state in states[:: len(states) // SAMPLE])
    assert found.keys() == {"went on"}  # nothing that counted was lost


@pytest.mark.slow
def test_a_run_goes_on_after_a_power_cut_at_every_moment(recorded: Recorded) -> None:
    run, whole, states = recorded
    assert Counter(go_on(run, whole, state) for state in states) == {"went on": len(states)}


def test_a_store_that_does_not_sync_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SmallRun(tmp_path)
    recorder = PowerRecorder(run.folder)
    with monkeypatch.context() as patch:
        patch.setattr(durability, "_sync", lambda path, flags: None)
        recorder.record(lambda: run.command())
    whole = run.files()
    states = [state for state in reversed(recorder.states) if state.loss == "emptied"]
    assert "repaired" in (go_on(run, whole, state) for state in states)


def test_after_a_power_cut_the_last_checkpoint_is_there_or_a_later_one(tmp_path: Path) -> None:
    stage, identity = tmp_path / "stage1", {"seed": 0}
    root = str(stage / "checkpoints")
    recorder, finished = PowerRecorder(stage), list[int]()  # moments at which a checkpoint was finished

    def train() -> None:
        store.write_text(str(stage / "started.json"), "{}")
        (stage / "metrics.jsonl").write_text("{}\n")
        for step in range(1, 4):
            weights = {"weight": torch.full((4,), float(step))}
            state = TrainState(step, weights, {"exp_avg.weight": torch.ones(4)})
            checkpoint.save(root, state, identity, b"{}\n", keep=1)
            finished.append(recorder.moment)

    recorder.record(train)
    found = set()
    for state in recorder.states:
        state.write(stage)
        newest, _ = checkpoint.find_newest(root, identity)
        step = 0 if newest is None else newest.step
        if newest is not None:
            assert checkpoint.load(newest).weights["weight"].tolist() == [float(step)] * 4
        saved = sum(moment <= state.moment for moment in finished)
        assert step in (saved, saved + 1), f"a cut before {state.before} ({state.loss})"
        found.add(step)
    assert found == {0, 1, 2, 3}
