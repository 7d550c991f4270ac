"""What the report on Figure 2 says of the curves it is given."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.train_jobs import UNTRAINED_JOB


@pytest.fixture
def figure2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from benchmarks.training import figure2

    return sys.modules[figure2.__name__]


def curves(scratch: list[float], unlocked: list[float], two_stages: list[float]) -> dict[str, object]:
    """Three points each: nothing learned, the end of stage 1 at a third, and the end, by seed."""
    ends = {"from scratch": scratch, "without locking": unlocked, "two stages": two_stages}
    return {
        name: {seed: {0: 1.0, 100: 20.0, 300: end} for seed, end in enumerate(values)}
        for name, values in ends.items()
    }


def test_a_finding_holds_where_every_pair_of_seeds_agrees(figure2: ModuleType) -> None:
    made = curves([5.0, 6.0, 7.0], [30.0, 31.0, 32.0], [31.5, 33.0, 40.0])
    initialised, locked, second = figure2.findings(made, 1 / 3)
    assert "holds, in every pair of seeds (31.0 ± 1.0 against 6.0 ± 1.0)" in initialised
    assert "open: the seeds overlap" in locked
    assert "holds" in second
    assert "against 20.0 ± 0.0" in second  # the end of stage 1
    reverse = figure2.findings(curves([50.0], [30.0], [10.0]), 1 / 3)
    assert all("does not hold, in any pair of seeds" in finding for finding in reverse)
    assert figure2.findings({"two stages": {0: {0: 1.0}}}, 1 / 3) == []


def test_the_second_stage_s_samples_come_after_the_first_s(figure2: ModuleType, tmp_path: Path) -> None:
    legs = []
    for name, points in (("first", {0: 1.0, 128: 5.0}), ("second", {0: 5.0, 256: 9.0})):
        folder = tmp_path / name
        folder.mkdir()
        lines = [{"step": 1, "samples_seen": 128, "loss": 2.0}]
        lines += [
            {"samples_seen": seen, "evaluation": "fluent", "recall": {"mean_recall": value}}
            for seen, value in points.items()
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        legs.append(dataclasses.replace(UNTRAINED_JOB, folder=str(folder)))
    assert figure2._joined(legs) == {0: 1.0, 128: 5.0, 384: 9.0}


def test_the_plot_is_the_same_for_the_same_curves(figure2: ModuleType, tmp_path: Path) -> None:
    made = curves([5.0, 6.0], [30.0, 31.0], [31.5, 33.0])
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        figure2.plot(made, str(path))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "without locking (2 seeds)" in paths[0].read_text()
