"""`cnclip why` for images on disk: rows are found by every name that their file has."""

import json
import os
from pathlib import Path

import polars as pl
import pytest

from pipeline.cli import main
from tests.helpers.own_corpus import make_own

NAMES = ("猫 1.png", "100%.png", "a#1.png", "why?.png", "sub/1.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filtered captions of images on disk, some with letters that end or escape an address."""
    folder = make_own(tmp_path_factory.mktemp("own"))
    rows = [f"{name},第{number}只橘猫趴在窗台上" for number, name in enumerate(NAMES)]
    rows += ["11.png,猫", "broken.png", "./dotted.png,一只黑狗在草地上奔跑"]
    (folder / "captions.csv").write_text("\n".join(["url,caption", *rows]) + "\n", encoding="utf-8")
    for name in NAMES:
        (folder / "图片" / name).parent.mkdir(exist_ok=True)
        (folder / "图片" / name).touch()
    assert main(["run", str(folder / "run.toml"), "--to", "dedup"]) == 0
    return folder


def _found(capsys: pytest.CaptureFixture[str], folder: Path, asked: str) -> list[str]:
    assert main(["why", str(folder / "run.toml"), asked, "--json"]) == 0
    return [row["caption"] for row in json.loads(capsys.readouterr().out)["rows"]]


@pytest.mark.parametrize("name", NAMES)
def test_by_the_path_that_the_table_holds(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _found(capsys, folder, name) == [f"第{NAMES.index(name)}只橘猫趴在窗台上"]


@pytest.mark.parametrize("name", NAMES)
def test_by_the_files_own_path(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [f"第{NAMES.index(name)}只橘猫趴在窗台上"]
    assert _found(capsys, folder, str(folder / "图片" / name)) == expected
    monkeypatch.chdir(folder)
    assert _found(capsys, folder, os.path.join("图片", name)) == expected
    assert _found(capsys, folder, os.path.join(".", "图片", "..", "图片", name)) == expected
    link = folder / "link"
    if not link.exists():
        link.symlink_to(folder / "图片")
    assert _found(capsys, folder, str(link / name)) == expected


@pytest.mark.parametrize("site", ["http://corpus.invalid", "http://127.0.0.1:40123/a-token"])
def test_by_the_address_on_the_runs_own_server(
    site: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _found(capsys, folder, f"{site}/pictures/mine/100%25.png") == ["第1只橘猫趴在窗台上"]


def test_a_table_may_name_files_with_a_leading_dot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _found(capsys, folder, "./dotted.png") == ["一只黑狗在草地上奔跑"]
    assert _found(capsys, folder, str(folder / "图片" / "dotted.png")) == ["一只黑狗在草地上奔跑"]


def test_dropped_rows_have_their_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", str(folder / "run.toml"), str(folder / "图片" / "11.png")]) == 0
    assert "dropped by filter_text: too_short" in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["1.png", "0.png", "图片/none.png", "/etc/passwd"])
def test_a_path_of_no_row_is_one_clear_line(
    asked: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["why", str(folder / "run.toml"), asked]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error == [
        f"error: {asked}: not in any caption table of {folder}/run;"
        " give a key, a whole URL, or the path of an image on disk"
    ]


@pytest.mark.parametrize("asked", ["\u3000http://a.cn/1.jpg\t", "http://a.cn/1.jpg", "//b.cn/2.jpg"])
def test_by_an_address_as_its_table_has_it(
    asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"url": ["\u3000http://a.cn/1.jpg\t", "//b.cn/2.jpg"], "caption": ["一只黑狗在草地上"] * 2}
    pl.DataFrame(rows).write_parquet(tmp_path / "table.parquet")
    (tmp_path / "run.toml").write_text(
        f'''
[run]
folder = "{tmp_path}/run"
[corpus]
kind = "tables"
[[corpus.tables]]
path = "{tmp_path}/table.parquet"
name = "mine"
address_scheme = "http"
''',
        encoding="utf-8",
    )
    assert main(["run", str(tmp_path / "run.toml"), "--to", "filter_text"]) == 0
    capsys.readouterr()
    assert _found(capsys, tmp_path, asked) == ["一只黑狗在草地上"]
