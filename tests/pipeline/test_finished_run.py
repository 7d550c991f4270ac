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
# Their versions rose since: white space around an address is not part of it; plain images are not copies of
# each other; images that EXIF turns, of 16 bits or with transparency are seen otherwise; the download marks
# images, and filter_image reads its tables only.
RAISED = (
    "filter_text", "download", "filter_image", "split", "embed", "baseline", "zeroshot",
)  # fmt: skip
# Stages that came since, and those that read what they write.
TO_DO = {
    "gather_hashes": "",
    "find_copies": "after gather_hashes",
    "merge_copies": "",
    "dedup_image": "after merge_copies",
    "lock": "after merge_copies",
    "report": "after merge_copies",
}


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(Path(__file__).parent / "data" / "finished_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    with open(RECIPE, "a", encoding="utf-8") as file:
        file.write("\n[dedup]\npartitions = 4\n")  # the default at that time; now it follows the rows
    return tmp_path / "old_run" / "run"


def _bytes_by_path(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "run.resolved.toml")
    }


def test_every_stage_of_an_old_run_is_done_unless_its_version_rose(old_run: Path) -> None:
    run, _ = load(RECIPE)
    states = {status.stage.name: (status.state, status.why) for status in survey(run)}
    raised = dict.fromkeys(RAISED, (State.STALE, "its configuration changed"))
    raised["filter_image"] = (State.STALE, "its configuration changed and its inputs changed")
    to_do = {stage: (State.TO_DO, why) for stage, why in TO_DO.items()}
    assert states == dict.fromkeys(STAGES, (State.DONE, "")) | raised | to_do


def test_running_an_old_run_again_changes_nothing(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _bytes_by_path(old_run)
    assert main(["run", RECIPE]) == 2
    assert "filter_text is stale" in capsys.readouterr().err
    assert _bytes_by_path(old_run) == before
    assert main(["run", RECIPE, "--redo", "--to", "dedup"]) == 0  # filter_text gives the same rows
    assert "done: 1;" in capsys.readouterr().out
    after = _bytes_by_path(old_run)
    assert {path for path in before if before[path] != after[path]} <= {
        *("filter_text/manifest.json", "filter_text/started.json"),
        *(path for path in before if path.startswith("filter_text/receipts/")),
    }


def test_repair_finds_nothing_in_an_old_run(old_run: Path) -> None:
    before = _bytes_by_path(old_run)
    assert main(["run", RECIPE, "--repair", "--to", "corpus"]) == 0
    assert main(["run", RECIPE, "--repair", "--from", "dedup", "--to", "dedup"]) == 0
    assert _bytes_by_path(old_run) == before


def test_an_old_run_verifies(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", RECIPE]) == 0
    report = old_run / "report" / "report.html"
    report.write_bytes(report.read_bytes() + b" ")
    assert main(["verify", RECIPE]) == 1
    assert "report.html" in capsys.readouterr().out


def test_plan_names_what_a_redo_may_lead_to(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RECIPE]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "stale (its configuration changed)" in rows["filter_text"]
    for stage in ("dedup", "stage2", "retrieval"):
        assert "done (again if the output of filter_text changes)" in rows[stage]
    assert "again if" not in rows["corpus"]


def test_a_changed_setting_makes_a_stage_of_an_old_run_stale(old_run: Path) -> None:
    run, _ = load(RECIPE, ["filter_text.min_characters=6"])
    stale = [status.stage.name for status in survey(run) if status.state is State.STALE]
    assert stale == [*RAISED]
