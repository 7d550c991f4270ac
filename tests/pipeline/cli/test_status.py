"""What a data engineer asks of a run: shares, rates, drop reasons, dropped rows; and JSON documents."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.cli import main
from pipeline.cli.documents import KEYS
from pipeline.core.files.lock import exclusive
from pipeline.last_start import load_as_started
from pipeline.tools import doctor
from tests.helpers.json_documents import check_keys
from tests.helpers.table_run import write_table_run

ROWS = [
    ("http://a.cn/1.jpg", "一只黑色的猫在屋顶上", 0.31),
    ("http://a.cn/2.jpg", "猫", 0.30),
    ("http://a.cn/3.jpg", "\x1b[31m猫", 0.30),
    ("http://a.cn/4.jpg", "[b]狗", 0.35),
    ("http://a.cn/5.jpg", "一只白色的狗在草地上", 0.10),
    ("http://a.cn/1.jpg", "一只黑色的猫在屋顶上", 0.31),
    ("http://a.cn/6.jpg", "包邮特价一只白色的狗", 0.40),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run up to dedup: of seven rows two are kept."""
    folder = tmp_path_factory.mktemp("status")
    path = write_table_run(folder, ROWS)
    assert main(["run", str(path), "--to", "dedup"]) == 0
    return str(path)


def _out(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main(words) == status
    return capsys.readouterr().out


def _document(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(_out(capsys, *words, "--json", status=status))
    check_keys(words[0], document)
    return document


def test_the_table_has_the_share_kept_and_the_rate(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    header, *rows = _out(capsys, "status", run).splitlines()
    assert header.split()[3:] == ["in", "kept", "dropped", "kept", "%", "rows/s", "seconds", "MB"]
    dedup = next(row for row in rows if row.startswith("dedup")).split()
    assert dedup[1:7] == ["done", "2/2", "3", "2", "1", "66.7"]
    assert float(dedup[7].replace(",", "")) > 0


def test_the_reasons_of_each_stage(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, *rows = _out(capsys, "status", run, "--reasons").splitlines()
    assert [row.split() for row in rows] == [
        ["filter_text", "too_short", "2", "28.6%"],
        ["filter_text", "blacklist:advertising", "1", "14.3%"],
        ["filter_text", "score_below_threshold", "1", "14.3%"],
        ["dedup", "duplicate", "1", "33.3%"],
    ]


def test_examples_have_key_caption_url_and_score(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    header, *rows = _out(capsys, "status", run, "--examples", "too_short").splitlines()
    assert header.split() == ["stage", "drop", "reason", "key", "score", "caption", "url"]
    assert {tuple(row.split()[-3:]) for row in rows} == {
        ("0.3000", "猫", "http://a.cn/2.jpg"),
        ("0.3500", "[b]狗", "http://a.cn/4.jpg"),
    }
    assert len(_out(capsys, "status", run, "--examples", "too_short", "-n", "1").splitlines()) == 2
    assert "包邮特价" in _out(capsys, "status", run, "--examples", "blacklist")
    both = _out(capsys, "status", run, "--examples", "duplicate", "--reasons")
    assert "http://a.cn/1.jpg" in both
    assert "score_below_threshold" in both


def test_only_as_many_rows_are_read_as_are_shown(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = []
    scan = pl.scan_parquet
    monkeypatch.setattr(
        pl, "scan_parquet", lambda path, **more: scanned.append(str(path)) or scan(path, **more)
    )
    _out(capsys, "status", run, "--examples", "duplicate")
    tables = [path for path in scanned if "/dropped/" in path]
    assert len(tables) == 1  # of three drop tables, the one whose receipt has the reason
    assert "/dedup/" in tables[0]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("too_shrt", "did you mean too_short?"),
        ("xyzzy", "reasons: blacklist:advertising, duplicate, score_below_threshold, too_short"),
    ],
)
def test_an_unknown_reason(run: str, reason: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", run, "--examples", reason]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_run_without_drops(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = ("--set", f"run.folder={tmp_path}/none")
    assert _out(capsys, "status", run, "--reasons", *elsewhere) == "no rows were dropped\n"
    assert main(["status", run, "--examples", "too_short", *elsewhere]) == 2
    assert "no rows have been dropped yet" in capsys.readouterr().err


def test_status_as_a_document(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = _document(capsys, "status", run, "--examples", "too_short", "-n", "5")
    stages = {stage["name"]: stage for stage in document["stages"]}
    assert stages["filter_text"]["dropped"]["too_short"] == 2
    assert stages["dedup"]["share_kept"] == pytest.approx(2 / 3)
    assert stages["download"]["share_kept"] is None
    assert [example["caption"] for example in document["examples"]].count("猫") == 1
    assert "examples" not in json.loads(_out(capsys, "status", run, "--json"))


def test_plan_as_a_document(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = _document(capsys, "plan", run)
    assert [stage["state"] for stage in document["stages"]][:4] == ["done", "done", "done", "to do"]
    assert document["hardware"] is None
    training = _document(capsys, "plan", run, "--hardware", "H100")
    assert training["hardware"]["name"] == "H100"
    assert [item["name"] for item in training["trainings"]] == ["stage1"]
    paper = _document(capsys, "plan", "pretrain")
    assert paper["folder"] is None
    assert len(paper["trainings"]) > 4


def test_errors_are_in_the_document_and_on_standard_error(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ("--set", f'corpus.tables=[{{path="{tmp_path}/none.csv", name="none"}}]')
    assert main(["plan", run, *missing, "--json"]) == 2
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert len(document["errors"]) == 1
    assert captured.err.splitlines()[-1] == f"error: {document['errors'][0]}"
    assert main(["plan", run, "--set", "nonsense", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("error: --set nonsense")


def test_why_as_a_document(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    kept, dropped = _document(capsys, "why", run, "http://a.cn/1.jpg")["rows"]
    assert (kept["stage"], kept["reason"]) == (None, None)
    assert (dropped["stage"], dropped["reason"], dropped["row"]) == ("dedup", "duplicate", 5)
    row = _document(capsys, "why", run, "http://a.cn/5.jpg")["rows"][0]
    assert (row["reason"], row["detail"]) == ("score_below_threshold", "0.1000 < 0.26")


def test_doctor_as_a_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [doctor.Finding("Python", True, "3.11"), doctor.Finding("disk", False, "1 GB", "free space")]
    monkeypatch.setattr(doctor, "examine", lambda folder: findings)
    document = _document(capsys, "doctor", str(tmp_path), status=1)
    assert document["fit"] is False
    assert [check["check"] for check in document["checks"]] == ["Python", "disk"]


def test_every_command_with_a_document_has_its_keys_written_down() -> None:
    from pipeline.cli import program

    with_json = {
        name
        for name, command in program().commands.items()
        if any("--json" in param.opts for param in command.params)
    }
    assert with_json == set(KEYS) == {"plan", "status", "why", "inspect", "doctor", "eval"}


def test_a_quiet_and_a_verbose_run(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run", run, "--to", "filter_text", "--set")
    assert main([*words, f"run.folder={tmp_path}/quiet", "--quiet"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: filter_text dropped 4 of 7 rows")
    assert len(err.splitlines()) == 1
    assert main(["-v", *words, f"run.folder={tmp_path}/verbose"]) == 0
    assert "filter_text: 7 in, 3 kept, " in capsys.readouterr().err


def test_the_stage_that_a_command_works_on_is_working(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    def working() -> list[str]:
        return [row.split()[0] for row in _out(capsys, "status", run).splitlines() if " working " in row]

    folder = load_as_started(run)[0].folder
    assert working() == []
    with exclusive(folder):
        assert working() == ["download"]
    assert working() == []
    Path(folder, ".lock").write_text("cnclip run, process 1")  # it was killed
    assert working() == []
    Path(folder, ".lock").unlink()
    Path(folder, ".lock").mkdir()
    assert working() == []
