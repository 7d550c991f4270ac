"""Receipts of many tasks in one file count only as long as they are those of the folder."""

import os
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.core import run as run_module
from pipeline.core import store
from pipeline.core.files import folded_receipts
from pipeline.core.files.folded_receipts import read_receipts_in
from pipeline.core.run import State, manifest_path, survey
from tests.helpers.number_stages import EvenConfig, number_run

FOLDED = ".folded"


@pytest.fixture
def read_alone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The receipts that are read by themselves, in a run that folds those of four tasks."""
    monkeypatch.setattr(folded_receipts, "LEAST", 4)
    monkeypatch.setattr(run_module, "_FEW_TASKS", 0)
    names: list[str] = []
    read = folded_receipts.receipts_at

    def noted(paths: list[str]) -> object:
        names.extend(os.path.basename(path) for path in paths)
        return read(paths)

    monkeypatch.setattr(folded_receipts, "receipts_at", noted)
    return names


def test_only_what_changed_is_read_by_itself(numbers: Path, tmp_path: Path, read_alone: list[str]) -> None:
    run = number_run(numbers, tmp_path / "run")
    assert runner.execute(run, run.stages, redo=False) == 2
    folder = store.join(run.folder, "even", "receipts")
    before = read_receipts_in(folder)
    assert list(before) == ["00000.json", "00001.json", "00002.json", "00003.json"]
    assert read_alone == []
    path = Path(folder, "00002.json")
    path.write_text(path.read_text().replace('"num_kept": ', '"num_kept": 1'))  # damaged
    Path(folder, "00003.json").write_bytes(Path(folder, "00001.json").read_bytes())  # another task's
    after = read_receipts_in(folder)
    assert read_alone == ["00002.json", "00003.json"]
    assert after == {**before, "00002.json": None, "00003.json": None}


@pytest.mark.parametrize("damage", [b"", b"x" * 200, None])
def test_a_damaged_file_counts_for_nothing(
    damage: bytes | None, numbers: Path, tmp_path: Path, read_alone: list[str]
) -> None:
    run = number_run(numbers, tmp_path / "run")
    runner.execute(run, run.stages, redo=False)
    path = Path(run.folder, "even", "receipts", FOLDED)
    data = path.read_bytes()
    path.write_bytes(data[:-1] if damage is None else damage)
    os.remove(manifest_path(run, "even"))
    assert [status.tasks_done for status in survey(run)] == [4, 4]
    assert len(read_alone) == 4


def test_a_stage_that_ends_early_has_folded_what_is_done(
    numbers: Path, tmp_path: Path, read_alone: list[str]
) -> None:
    run = number_run(numbers, tmp_path / "run", EvenConfig(kill_in=""))
    (numbers / "00004.txt").write_text("not a number")
    with pytest.raises(Exception, match="task 00004 of even failed"):
        runner.execute(run, run.stages, redo=False)
    assert Path(run.folder, "even", "receipts", FOLDED).exists()
    status = survey(run)[1]
    assert (status.state, status.tasks_done) == (State.TO_DO, 4)
    assert read_alone == []
