"""Records of trainings that are spread over several calls, and the curve of one."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.training.arms import BEST, record_runs
from benchmarks.training.compute import ARMS, TOGETHER, curve_of, plot, print_table
from pipeline.catalog import load
from tests.helpers.train_jobs import UNTRAINED_JOB
from training.config.job import TrainJob

ORDER = ["paper", "cheap"]


def run(
    arm: str, seed: int, recall: float = 10.0, machine: str = "mine", ranks: int = 1
) -> dict[str, object]:
    cost = 10.0 if arm == "paper" else 2.0
    return {
        "arm": arm,
        "seed": seed,
        "machine": machine,
        "ranks": ranks,
        "recall": {"style": recall, "concept": recall / 2},
        "petaflops": cost,
        "seconds": 100 * cost,
        "cpu_seconds": 200 * cost,
        "curve": [[cost / 2, recall / 4], [cost, 0.75 * recall]],
    }


def test_later_calls_add_their_runs_and_replace_only_those_of_the_same_arm_and_seed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    record_runs(path, "nine epochs", [run("cheap", 0), run("paper", 1)], ORDER)
    again = run("cheap", 0, recall=20.0)
    found = record_runs(path, "nine epochs", [again, run("paper", 0)], ORDER, pairs=7)
    assert found == [run("paper", 0), run("paper", 1), again]
    assert json.loads(path.read_text(encoding="utf-8")) == {"what": "nine epochs", "pairs": 7, "runs": found}
    assert record_runs(path, "nine epochs", [], ORDER) == found


def test_runs_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record_runs(path, "nine epochs", [run("paper", 0)], ORDER)
    before = path.read_bytes()
    with pytest.raises(
        SystemExit, match=r"record\.json has runs of other settings \(nine epochs\).*--results"
    ):
        record_runs(path, "six epochs", [run("paper", 1)], ORDER)
    assert path.read_bytes() == before


def test_shares_are_those_of_the_same_seed_and_seconds_those_of_one_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    elsewhere = run("cheap", 1, machine="another")
    alone = run("cheap", 2)  # its paper's run is missing
    print_table([run("paper", 0), run("paper", 1), run("cheap", 0), elsewhere, alone])
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == ["cheap", "10.0", "±", "0.0", "5.0", "±", "0.0", "20%", "20%", "20%", "3"]
    for other in (elsewhere, run("cheap", 1, ranks=2)):
        print_table([run("paper", 1), other])
        assert capsys.readouterr().out.splitlines()[-1].split() == ["cheap", "10.0", "5.0", "20%", "1"]


def write_leg(folder: Path, points: Mapping[int, tuple[float, float]], teraflops: float) -> TrainJob:
    folder.mkdir()
    lines: list[dict[str, object]] = [{"step": 1, "samples_seen": 100, "loss": 2.0}]
    for seen, recalls in points.items():
        for name, recall in zip(("style", "concept"), recalls, strict=True):
            lines.append({"samples_seen": seen, "evaluation": name, "recall": {"mean_recall": recall}})
        lines.append({"samples_seen": seen, "evaluation": "both", "recall": {"mean_recall": 0.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = [{"step": step, "teraflops": teraflops, "seconds": 1000.0} for step in (1, 2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return dataclasses.replace(UNTRAINED_JOB, folder=str(folder))


def test_the_curve_of_several_trainings_counts_the_flops_of_those_before(tmp_path: Path) -> None:
    first = write_leg(tmp_path / "first", {0: (0, 0), 100: (2, 4), 200: (6, 8)}, teraflops=1)
    second = write_leg(tmp_path / "second", {0: (6, 8), 400: (10, 20)}, teraflops=3)
    assert curve_of([first, second]) == [(1.0, 3.0), (2.0, 7.0), (8.0, 15.0)]


def test_the_figure_is_the_same_for_the_same_runs(tmp_path: Path) -> None:
    runs = [run("paper", 0), run("paper", 1, recall=12.0), run("cheap", 0)]
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        plot(runs, str(path))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "cheap" in paths[0].read_text()


def test_the_recipe_of_the_images_trains_as_the_best_arm_does() -> None:
    _, config = load("fast_pictures", [])
    assert config.stage1 is None
    assert config.stage2 is not None
    assert ARMS[TOGETHER] == (0, 0, config.stage2.epochs, BEST, {})
    assert {key: getattr(config.stage2, key) for key in BEST} == BEST
