"""Commands that look at a run read the settings it was started with, and say how its file differs."""

import tomllib
from pathlib import Path

import pytest

from pipeline import cli, runner
from pipeline.core.records import ConfigError, InputError
from pipeline.last_start import load_as_started
from tests.helpers.table_run import write_table_run


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write_table_run(tmp_path, epochs=3)


def main(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def epochs_started_with(run_file: Path) -> int:
    table = tomllib.loads((run_file.parent / "run" / "run.resolved.toml").read_text())
    epochs: int = table["stage1"]["epochs"]
    return epochs


def test_a_set_of_a_run_is_kept_with_it(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--set=stage1.epochs=2", "--set=filter_text.min_characters=1")
    assert main(capsys, "run", run_file, "--to", "dedup", *given)[0] == 0
    assert epochs_started_with(run_file) == 2
    folder = run_file.parent / "run"
    for words in (("status",), ("verify",), ("why",)):
        more = ("http://a.cn/2.jpg",) if words == ("why",) else ()
        status, out, err = main(capsys, *words, run_file, *more)
        assert status == 0
        said = [line for line in err.splitlines() if line.startswith("note: ")]
        assert said == [
            f"note: {folder} was started with filter_text.min_characters = 1 ({run_file}: 5),"
            f" stage1.epochs = 2 ({run_file}: 3)"
        ]
        assert "stale" not in out
    assert "dropped" not in out  # `why`: too short by the file's own rules, but those were not in force


def test_plan_and_run_follow_the_file_and_say_what_differs(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(capsys, "run", run_file, "--to", "dedup", "--set=filter_text.min_characters=1")
    _, out, err = main(capsys, "plan", run_file)
    assert "filter_text.min_characters = 1 (now: 5)" in err
    assert "stale" in out
    _, out, err = main(capsys, "plan", run_file, "--set=filter_text.min_characters=1")
    assert (err, "stale" in out) == ("", False)
    assert main(capsys, "run", run_file, "--to", "dedup", "--redo")[0] == 0
    assert main(capsys, "status", run_file)[2] == ""  # what it was last started with is the file's


def test_a_run_is_named_by_its_folder_too(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--to", "filter_text", "--set=filter_text.min_characters=1")
    assert main(capsys, "run", run_file, *given)[0] == 0
    moved = run_file.parent / "moved"
    (run_file.parent / "run").rename(moved)
    status, out, err = main(capsys, "status", moved)
    assert (status, err) == (0, "")
    assert next(line for line in out.splitlines() if line.startswith("filter_text")).split()[1] == "done"
    assert main(capsys, "report", moved)[0] == 0
    assert (moved / "report.html").is_file()
    assert main(capsys, "run", moved, "--to", "dedup")[0] == 0
    assert (moved / "dedup" / "manifest.json").is_file()
    assert not (run_file.parent / "run").exists()


def test_settings_are_there_as_soon_as_work_begins(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        assert epochs_started_with(run_file) == 7
        raise InputError("killed")

    assert main(capsys, "run", run_file, "--to", "corpus")[0] == 0
    monkeypatch.setattr(runner, "_run_stage", fail)
    assert main(capsys, "run", run_file, "--set=stage1.epochs=7")[0] == 1
    assert main(capsys, "report", run_file.parent / "run")[::2] == (0, "")


def test_a_run_that_is_refused_was_not_started(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(capsys, "run", run_file, "--to", "filter_text")
    status, _, err = main(
        capsys, "run", run_file, "--set=filter_text.min_characters=1", "--set=stage1.epochs=9"
    )
    assert (status, "filter_text is stale" in err) == (2, True)
    assert epochs_started_with(run_file) == 3


def test_settings_that_cannot_be_read_are_passed_over(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(capsys, "run", run_file, "--to", "filter_text")
    resolved = run_file.parent / "run" / "run.resolved.toml"
    resolved.write_text(resolved.read_text() + "\n[of_another_release]\nkey = 1\n")
    status, _, err = main(capsys, "status", run_file)
    assert status == 0
    assert err.startswith(f"note: {resolved}: of_another_release: unknown key")
    assert main(capsys, "status", resolved.parent)[0] == 2


def test_a_folder_that_is_no_run_is_refused_without_a_list_of_recipes(tmp_path: Path) -> None:
    for folder, said in (
        (tmp_path / "none", "no such folder or file"),
        (tmp_path, "neither a TOML file nor"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            load_as_started(str(folder))
        assert "demo.toml" not in str(caught.value)
