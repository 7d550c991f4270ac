"""The command line as a person meets it: exit statuses, and errors in one line that name file and key."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from pipeline import cli as command_line
from pipeline.cli.errors import reported
from pipeline.tools import doctor
from tests.helpers.table_run import KEPT_URL, SHORT_URL, write_table_run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run of a table of two rows: one is kept, the caption of the other is too short."""
    return write_table_run(tmp_path)


def _main(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = command_line.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def _one_error(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_plan_run_status_verify_why(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _main(capsys, "plan", recipe)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[2:]][:4] == [
        "corpus", "filter_text", "dedup", "download",
    ]  # fmt: skip
    assert "done" not in out
    status, _, err = _main(capsys, "run", recipe, "--to", "dedup")
    assert status == 0
    assert "[2/3] filter_text: 1 of 1" in err
    folder = recipe.parent / "run"
    assert (folder / "run.resolved.toml").is_file()
    assert (folder / "dedup" / "manifest.json").is_file()
    status, out, _ = _main(capsys, "run", recipe, "--to", "dedup")
    assert (status, out.strip()) == (0, "nothing to do: all 3 stages are done")
    status, out, _ = _main(capsys, "status", recipe)
    assert status == 0
    row = next(line for line in out.splitlines() if line.startswith("filter_text")).split()
    assert row[1:6] == ["done", "1/1", "2", "1", "1"]
    assert _main(capsys, "verify", recipe)[0] == 0
    status, out, _ = _main(capsys, "why", recipe, SHORT_URL)
    assert status == 0
    assert "dropped by filter_text: too_short (1 characters; 5 to 50 stay)" in out
    status, out, _ = _main(capsys, "why", recipe, KEPT_URL)
    assert "kept so far" in out
    status, _, err = _main(capsys, "why", recipe, "http://a.cn/3.jpg")
    assert status == 1
    assert "http://a.cn/3.jpg: not in any caption table" in _one_error(err)


def test_verify_says_what_it_did_not_see(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recipe.parent / "run"
    status, out, err = _main(capsys, "verify", recipe)
    assert (status, out) == (1, "")
    assert f"{folder}: no such folder; run {recipe} first, or check [run] folder" in _one_error(err)
    folder.mkdir()
    status, out, err = _main(capsys, "verify", recipe, "--to", "dedup")
    assert (status, out) == (1, "")
    assert "nothing to verify: no stage of corpus, filter_text, dedup is finished" in _one_error(err)
    assert _main(capsys, "run", recipe, "--to", "filter_text")[0] == 0
    status, out, _ = _main(capsys, "verify", recipe, "--to", "download")
    assert (status, out.splitlines()) == (
        0,
        [
            "all outputs match their manifests",
            "not verified because they are not finished: dedup, download"
            " (2 of 4 stages; their outputs were not read)",
        ],
    )
    assert _main(capsys, "verify", recipe, "--stage", "dedup")[0] == 1
    status, out, _ = _main(capsys, "verify", recipe, "--stage", "corpus")
    assert (status, out) == (0, "all outputs match their manifests\n")


def test_a_stage_that_drops_much_is_said_and_named_by_later_errors(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = _main(capsys, "run", recipe, "--to", "filter_text")
    assert status == 0
    assert "warning: filter_text dropped 1 of 2 rows (50%): too_short 1\n" in err
    assert "note: filter_text dropped 1 of 2 rows (50%): too_short 1" in _main(capsys, "status", recipe)[1]
    table = recipe.parent / "run" / "filter_text" / "kept" / "00000.parquet"
    assert table.exists()
    status, _, err = _main(capsys, "run", recipe, "--to", "dedup")
    assert "warning" not in err


def test_verify_fails_where_a_byte_differs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(capsys, "run", recipe, "--to", "filter_text")[0] == 0
    path = recipe.parent / "run" / "filter_text" / "kept" / "00000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    status, out, _ = _main(capsys, "verify", recipe)
    assert status == 1
    assert f"{path}: bytes differ from what was written" in out
    assert _main(capsys, "run", recipe, "--stage", "filter_text", "--redo")[0] == 0
    assert _main(capsys, "verify", recipe)[0] == 0


@pytest.mark.parametrize("flag", ["--repair", "--mend"])  # the latter is what the flag was called before
def test_repair_redoes_what_is_damaged(recipe: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert _main(capsys, "run", recipe, "--to", "filter_text")[0] == 0
    path = recipe.parent / "run" / "filter_text" / "kept" / "00000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert (
        f"repair it: cnclip run {recipe} --stage filter_text --repair" in _main(capsys, "verify", recipe)[1]
    )
    assert _main(capsys, "run", recipe, "--stage", "filter_text", flag)[0] == 0
    status, out, _ = _main(capsys, "verify", recipe)
    assert (status, out.splitlines()[0]) == (0, "all outputs match their manifests")


def test_the_help_of_every_command_ends_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    commands = (
        "plan run status verify why launch doctor retry diff reshard subset merge export guard predict score"
        " eval prompts negation embed index bench-index serve convert inspect"
    )
    for command in commands.split():
        with pytest.raises(SystemExit) as ended:
            command_line.main([command, "--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert f"Example: cnclip {command} " in shown
        assert "--mend" not in shown


def test_a_changed_setting_asks_for_redo(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run", recipe, "--to", "filter_text")
    assert _main(capsys, *words)[0] == 0
    changed = (*words, "--set", "filter_text.min_characters=1")
    status, _, err = _main(capsys, *changed)
    assert status == 2
    assert (
        "filter_text is stale: its configuration changed: min_characters 5 → 1; run with --redo"
        in _one_error(err)
    )
    assert _main(capsys, *changed, "--redo")[0] == 0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["plan", "none.toml"], 2, "none.toml: no such file"),
        (["plan", "RUN", "--set", "filter_text.min_scores=0.1"], 2, "did you mean filter_text.min_score?"),
        (["run", "RUN", "--set", "run.processes=two"], 2, "run.toml: run.processes"),
        (["run", "RUN", "--set", "nonsense"], 2, "--set nonsense: expected key=value"),
        (["run", "RUN", "--stage", "dedupe"], 2, "dedupe: no such stage"),
        (["run", "RUN", "--stage", "dedup"], 2, "dedup comes after filter_text, which is not done"),
        (["run", "RUN", "--set", "corpus.tables=[]"], 2, "corpus.tables: empty"),
        (["why", "RUN", "http://a.cn"], 1, "the corpus stage is not done"),
        (
            ["run", "RUN", "--to", "filter_text", "--set", "filter_text.min_characters=20"],
            1,
            "no rows left of 2 after filter_text (too_short removed 2)",
        ),
        (
            ["run", "RUN", "--set", 'evaluation=[{name="x", folder="/none"}]'],
            1,
            "/none/x_imgs.tsv: no such file",
        ),
    ],
)
def test_errors_are_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, message: str
) -> None:
    found, _, err = _main(capsys, *(recipe if word == "RUN" else word for word in words))
    assert message in _one_error(err)
    assert found == status


@pytest.mark.parametrize("ends", [KeyboardInterrupt, typer.Abort])
def test_ctrl_c_and_ctrl_d_are_one_line(
    ends: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    def asking() -> int:
        raise ends

    assert reported(asking) == 130
    assert capsys.readouterr().err == "interrupted; rerun the same command to resume\n"


def test_a_missing_and_an_empty_table(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = recipe.parent / "table.csv"
    table.write_text("url,caption\n")
    status, _, err = _main(capsys, "run", recipe)
    assert (status, f"{table}: no rows" in _one_error(err)) == (1, True)
    table.write_text("url,label\na,b\n")
    status, _, err = _main(capsys, "run", recipe, "--redo")
    assert (status, "found url, label" in _one_error(err)) == (1, True)
    table.unlink()
    status, _, err = _main(capsys, "run", recipe, "--redo")
    assert (status, f"{table}: no such file" in _one_error(err)) == (1, True)


def test_as_a_module_with_its_exit_statuses(recipe: Path) -> None:
    def cnclip(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)

    assert cnclip("plan", recipe).returncode == 0
    misspelt = cnclip("plan", recipe, "--set", "modell.name=x")
    assert misspelt.returncode == 2
    assert "did you mean model?" in _one_error(misspelt.stderr)
    usage = cnclip("plans", recipe)
    assert usage.returncode == 2
    assert "plans: no such command; did you mean plan?" in _one_error(usage.stderr)


def test_doctor_examines_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_RESOLV_CONF", str(tmp_path / "none"))  # no question leaves the machine
    status, out, _ = _main(capsys, "doctor", tmp_path / "not" / "made" / "yet")
    for check in (
        "Python",
        "packages",
        "disk",
        "memory",
        "writable",
        "compiler",
        "accelerator",
        "ranks",
        "DNS",
    ):
        assert any(line.startswith(check) for line in out.splitlines()), check
    assert "two processes met over gloo" in out
    assert status == (1 if "FAILED" in out else 0)
    assert not (tmp_path / "not").exists()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_no_space_left_is_one_line(recipe: Path, tiny_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"http://a.cn/{number},第{number * 7919}只黑色的猫\n" for number in range(5000))
    (recipe.parent / "table.csv").write_text("url,caption\n" + rows)
    words = ("run", recipe, "--to", "dedup", "--set", f"run.folder={tiny_disk}/run")
    status, _, err = _main(capsys, *words)
    assert status == 1
    message = _one_error(err)
    assert "No space left on device" in message
    assert "free space or move [run] folder" in message
    subprocess.run(["mount", "-o", "remount,size=8m", str(tiny_disk)], check=True)
    assert _main(capsys, *words)[0] == 0  # with space, the same command goes on


def _name_server(delays_seconds: list[float], error: int) -> tuple[socket.socket, threading.Thread]:
    """Answers one question after each delay with this error code (0: none), on loopback."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))

    def answer() -> None:
        for delay in delays_seconds:
            question, client = server.recvfrom(512)
            assert question[12:] == b"\x05arxiv\x03org\0\0\x01\0\x01"
            time.sleep(delay)
            server.sendto(question[:2] + bytes([0x81, 0x80 | error]) + question[4:], client)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return server, thread


@pytest.mark.parametrize(
    ("delays_seconds", "error", "found"),
    [
        ([0.05, 0, 0], 0, "on this machine) answers, again in"),
        ([0.05, 0.05, 0.05], 0, "no cache nearby"),
        ([0, 0, 0], 2, "does not resolve arxiv.org"),
    ],
)
def test_doctor_asks_the_resolver(
    delays_seconds: list[float],
    error: int,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "resolv.conf").write_text("# a comment\nnameserver nonsense\nnameserver 127.0.0.1\n")
    assert doctor.nameservers(str(tmp_path / "resolv.conf")) == ["127.0.0.1"]
    assert doctor.nameservers(str(tmp_path / "none")) == []
    server, thread = _name_server(delays_seconds, error)
    with server:
        port, ask = server.getsockname()[1], doctor.ask
        monkeypatch.setattr(doctor, "_RESOLV_CONF", str(tmp_path / "resolv.conf"))
        monkeypatch.setattr(doctor, "_CACHED_MS", 40.0)
        monkeypatch.setattr(doctor, "ask", lambda server: ask(server, port))
        finding = doctor._resolver(".")
        assert finding.fit
        assert found in finding.found
        assert ("it caches" in finding.found) == (delays_seconds == [0.05, 0, 0])
        thread.join(5)
