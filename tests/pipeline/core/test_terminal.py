"""No control character of a name, a caption or a message reaches a terminal or a log."""

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

from pipeline.cli import main
from pipeline.core.processes import say
from pipeline.core.progress import make_progress
from pipeline.core.records import InputError
from pipeline.core.terminal import guard, guarded_output, one_line, print_lines, visible
from pipeline.core.text_table import align
from training.ranks.launcher import watch

HOSTILE = "\x1b[31m\x9b2J\x07\r\b\x7f\u202e\u2066\u061c\u2028\udc80"
UNSEEN = set(HOSTILE) - {"[", "3", "1", "m", "2", "J"}
WHOLE = "名字 with ä, emoji 👩‍🚀🏴󠁧󠁢󠁥󠁮󠁧󠁿, zero\u200cwidth,\ttabs"


def test_what_is_unseen_is_shown_and_all_else_stays() -> None:
    assert visible(HOSTILE) == (r"\x1b[31m\u009b2J\x07\x0d\x08\u007f\u202e\u2066\u061c\u2028\udc80")
    assert visible(WHOLE) == WHOLE
    assert visible("a\nb") == "a\nb"
    assert one_line("a\nerror: b") == "a\\nerror: b"


def test_every_control_and_direction_character_is_covered() -> None:
    steering = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for letter in map(chr, range(0x30000)):
        category = unicodedata.category(letter)
        if unicodedata.bidirectional(letter) in steering or category in ("Cc", "Cs", "Zl", "Zp"):
            assert visible(letter) != letter or letter in "\n\t", hex(ord(letter))
        elif category[0] in "LMNPSZ":
            assert visible(letter) == letter, hex(ord(letter))


def test_a_line_of_json_stays_one() -> None:
    line = json.dumps({"text": HOSTILE + WHOLE}, ensure_ascii=False)
    assert json.loads(visible(line)) == {"text": HOSTILE + WHOLE}


def test_standard_streams_are_guarded_within_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded_output(), guarded_output():
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        print_lines([HOSTILE, "a\nb"])
        sys.stdout.writelines([HOSTILE])
        say(HOSTILE, sys.stderr)
    out, err = capsys.readouterr()
    assert not UNSEEN & set(out + err)
    assert out.count(r"\x1b[31m") == 3
    assert "a\\nb\n" in out


def test_what_a_terminal_cannot_encode_is_escaped_too() -> None:
    raw = io.BytesIO()
    stream = guard(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("猫\udc80\n")
    stream.flush()
    assert raw.getvalue() == b"\\u732b\\udc80\n"


def test_cells_and_progress_are_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    table = align([["name", "n"], [f"a\n{HOSTILE}", "1"]], (False, True))
    assert len(table.splitlines()) == 2
    assert not UNSEEN & set(table)
    make_progress(HOSTILE)(1, 1, f"a\n{HOSTILE}")
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert not UNSEEN & set(err)


def test_arguments_of_a_command_are_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", f"--{HOSTILE}"])
    assert not UNSEEN & set(capsys.readouterr().err)


def test_errors_that_name_a_file_are_guarded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in ("inspect", "run", "status", "verify", "diff"):
        name = str(tmp_path / f"{HOSTILE}\nerror: {command}.toml")
        assert main([command, name, name] if command == "diff" else [command, name]) in (1, 2)
        err = capsys.readouterr().err
        assert not UNSEEN & set(err), command
        assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1, err


def test_names_inside_weights_are_guarded(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Names of tensors and keys: nothing but the escapes reaches the descriptors of the process."""
    for number, state in enumerate(
        (
            {f"visual.{HOSTILE.encode('utf-8', 'replace').decode()}\nx": torch.zeros(1)},
            {"state_dict": {"\x1b]0;x\x07": torch.zeros(2)}},
        )
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(state, path)
        main(["inspect", str(path)])
        text = b"".join(capfdbinary.readouterr()).decode()
        assert "Traceback" not in text
        assert text
        assert not (UNSEEN - {"\udc80"}) & set(text), text


def test_names_of_files_that_are_not_utf8_are_printed(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\x1b[31m.toml"
    done = subprocess.run([sys.executable, "-m", "pipeline", "run", name], capture_output=True)
    assert done.returncode == 2
    assert rb"\udcff\x1b[31m.toml" in done.stderr
    assert b"\x1b" not in done.stderr


def test_the_log_of_training_is_guarded(tmp_path: Path) -> None:
    said = json.dumps({"text": HOSTILE})
    code = f"print({HOSTILE.removesuffix(chr(0xDC80))!r}); print('@notice ' + {said!r})"
    notices: list[str] = []
    environment = dict(os.environ)
    log = tmp_path / "train.log"
    status = watch([sys.executable, "-c", code], environment, str(log), lambda *_: None, notices.append)
    assert status == 0
    assert notices == [HOSTILE]
    text = log.read_text(encoding="utf-8")
    assert text.count(r"\x1b[31m") == 2
    assert not UNSEEN & set(text)


def test_what_nobody_would_read_to_its_end_loses_its_middle() -> None:
    key = "[" * 20_000
    line = str(
        InputError(f"texts.jsonl:4: `text` is missing; the line has {key}\nand more; correct the line")
    )
    assert line.startswith("texts.jsonl:4: `text` is missing; the line has [[[")
    assert line.endswith("[[[\\nand more; correct the line")
    assert len(line) < 1000
    assert len(one_line("many words " * 1000)) < 2000
    path = "/data/" + "a/" * 200 + "b.tar"
    assert one_line(f"{path}: no such file") == f"{path}: no such file"
