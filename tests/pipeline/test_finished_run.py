"""A run that the release before the present layout finished is still finished, stage by stage.

`data/finished_run.tar.xz` holds every stage but `english` of a run over 122 rows, made at commit b58f45f by
`cnclip run old_run/run.toml`; its checkpoints, logs, caches and site were left out.
"""

import tarfile
from pathlib import Path

import pytest

from pipeline.catalog import load
from pipeline.cli import main
from pipeline.core.run import State, survey

RECIPE = "old_run/run.toml"
STAGES = (
    "corpus", "filter_text", "dedup", "download", "filter_image", "find_copies", "dedup_image", "score",
    "filter_score", "split", "shards", "validation", "lock", "stage1", "stage2", "finetune", "embed", "index",
    "retrieval", "baseline", "zeroshot", "report",
)  # fmt: skip
# Stages that judge or show images otherwise since: their version was raised.
RAISED = {"filter_image", "find_copies", "split", "report"}


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(Path(__file__).parent / "data" / "finished_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "old_run" / "run"


def _bytes_by_path(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "run.resolved.toml")
    }


def test_every_stage_of_an_old_run_is_done(old_run: Path) -> None:
    run, _ = load(RECIPE)
    states = {status.stage.name: (status.state, status.why) for status in survey(run)}
    assert {name for name, (state, _) in states.items() if state is State.STALE} == RAISED
    assert {states[name][1] for name in RAISED} == {"its configuration changed"}
    done = {name: state for name, state in states.items() if name not in RAISED}
    assert done == {name: (State.DONE, "") for name in STAGES if name not in RAISED}


def test_running_an_old_run_again_changes_nothing(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _bytes_by_path(old_run)
    assert main(["run", RECIPE, "--to", "download"]) == 0
    assert "all 4 stages" in capsys.readouterr().out
    assert _bytes_by_path(old_run) == before


def test_an_old_run_verifies(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", RECIPE]) == 0
    report = old_run / "report" / "report.html"
    report.write_bytes(report.read_bytes() + b" ")
    assert main(["verify", RECIPE]) == 1
    assert "report.html" in capsys.readouterr().out


def test_a_changed_setting_makes_a_stage_of_an_old_run_stale(old_run: Path) -> None:
    run, _ = load(RECIPE, ["filter_text.min_characters=6"])
    assert {status.stage.name for status in survey(run) if status.state is State.STALE} == {
        "filter_text",
        "lock",
        *RAISED,
    }
