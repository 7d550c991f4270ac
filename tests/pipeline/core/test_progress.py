"""The bar of a stage: one line that fits, is whole after Ctrl-C, and gives way to what is printed."""

import re
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline.core import progress as progress_module
from pipeline.core.bar import fit
from pipeline.core.progress import close_progress, make_progress
from pipeline.core.terminal import Verbosity, guard, set_verbosity
from pipeline.core.text_table import display_width
from tests.helpers.pseudo_terminal import Shown, run_in_terminal

_BEGIN = """
import sys, time
from pipeline.cli.errors import reported
from pipeline.core.progress import make_progress
from pipeline.core.terminal import guarded_output

def work():
"""
_END = """
    return 0

with guarded_output():
    sys.exit(reported(work))
"""


def _show(tmp_path: Path, work: str, columns: int = 80, interrupt_at: str = "") -> Shown:
    script = tmp_path / "work.py"
    script.write_text(_BEGIN + textwrap.indent(textwrap.dedent(work), "    ") + _END)
    return run_in_terminal([sys.executable, str(script)], columns=columns, interrupt_at=interrupt_at)


TRAINING = """
progress = make_progress("[12/16] stage1 [red]", "step")
for step in range(1, 12):
    progress(step, 100_000, "loss 3.123 · 1,234 samples/s · data wait 0.1% · temperature 14.3")
    time.sleep(0.12)
progress(100_000, 100_000, "loss 3.123 · 1,234 samples/s · data wait 0.1% · temperature 14.3")
"""


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_a_bar_is_one_line_that_fits(tmp_path: Path, columns: int) -> None:
    shown = _show(tmp_path, TRAINING, columns)
    assert shown.status == 0
    assert max(display_width(drawing) for drawing in shown.drawings()) <= min(80, columns) - 2
    lines = shown.lines()
    assert len(lines) == 1
    if columns >= 40:
        assert "100,000/100,000" in lines[0]
    if columns >= 80:
        assert "[12/16] stage1 [red]" in lines[0]
        assert "loss 3.123" in lines[0]
        assert any("left" in drawing for drawing in shown.drawings())


def test_a_wide_label_fits_too(tmp_path: Path) -> None:
    work = 'make_progress("阶段" * 20, "row")(1, 3, "名字" * 30); make_progress("图" * 19, "row")(1, 3)'
    shown = _show(tmp_path, work)
    assert max(display_width(drawing) for drawing in shown.drawings()) <= 78
    assert len(shown.lines()) == 2


def test_ctrl_c_leaves_the_line_whole(tmp_path: Path) -> None:
    work = """
    progress = make_progress("[3/9] dedup", "row")
    for row in range(1, 2_000):
        progress(row, 2_000)
        time.sleep(0.05)
    """
    shown = _show(tmp_path, work, interrupt_at="rows/s")
    assert shown.status == 130
    bar, message = shown.lines()
    assert re.fullmatch(r"\[3/9\] dedup \S+ [\d,]+/2,000  [\d.]+ rows/s  [\d:]+ left", bar)
    assert message == "interrupted; rerun the same command to resume"
    assert shown.text.count("\x1b[?25l") == shown.text.count("\x1b[?25h")  # the cursor is back


def test_an_error_stands_below_the_bar(tmp_path: Path) -> None:
    work = """
    from pipeline.core.records import InputError
    make_progress("[1/2] corpus", "task")(1, 2)
    raise InputError("table.csv: empty")
    """
    shown = _show(tmp_path, work)
    assert shown.status == 1
    bar, message = shown.lines()
    assert bar.startswith("[1/2] corpus ")
    assert message == "error: table.csv: empty"


def test_what_is_printed_meanwhile_stands_above_the_bar(tmp_path: Path) -> None:
    work = r"""
    progress = make_progress("stage", "row")
    progress(1, 3)
    print("warning: \x1b[31m [bold]\rx", file=sys.stderr)
    print("a result")
    progress(3, 3)
    """
    shown = _show(tmp_path, work)
    warning, result, bar = shown.lines()
    assert warning == r"warning: \x1b[31m [bold]\x0dx"
    assert result == "a result"
    assert bar.startswith("stage ")


def test_one_bar_at_a_time(tmp_path: Path) -> None:
    work = """
    first = make_progress("first", "row")
    first(1, 3)
    second = make_progress("second", "row")
    second(3, 3)
    """
    first, second = _show(tmp_path, work).lines()
    assert first.startswith("first ")
    assert second.startswith("second ")


def test_words_are_cut_from_the_end_then_the_time() -> None:
    words = ["loss 3.1", "99 samples/s", "data wait 0.1%"]
    whole = "7/9  loss 3.1 · 99 samples/s · data wait 0.1%  0:09 left"
    assert fit("7/9", words, "0:09 left", len(whole)) == whole
    assert fit("7/9", words, "0:09 left", len(whole) - 1) == "7/9  loss 3.1 · 99 samples/s  0:09 left"
    assert fit("7/9", words, "0:09 left", 14) == "7/9  0:09 left"
    assert fit("7/9", words, "0:09 left", 13) == "7/9"
    assert fit("7/9", words, "0:09 left", 2) == ""


def test_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    progress = make_progress("[2/3] filter", "task")
    for second in range(0, 31):
        clock[0] = float(second)
        progress(100 + 2 * second, 1000, "rows")
    progress(1000, 1000)
    close_progress()
    assert capsys.readouterr().err.splitlines() == [
        "[2/3] filter: 120 of 1,000  2.0 rows/s  7:20 left",
        "[2/3] filter: 140 of 1,000  2.0 rows/s  7:10 left",
        "[2/3] filter: 160 of 1,000  2.0 rows/s  7:00 left",
        "[2/3] filter: 1,000 of 1,000  30 tasks/s",
    ]


def test_a_rate_below_one_a_second_is_a_time_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    progress = make_progress("shards", "shard")
    progress(0, 1000)
    clock[0] = 40.0
    progress(10, 1000)
    assert capsys.readouterr().err == "shards: 10 of 1,000  4.0 s each  1:06:00 left\n"


def test_a_quiet_command_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    set_verbosity(Verbosity.QUIET)
    try:
        make_progress("stage", "row")(3, 3)
    finally:
        set_verbosity(Verbosity.NORMAL)
    assert capsys.readouterr().err == ""


class _Terminal:
    """A stream that says it is a terminal and keeps what is written."""

    encoding = "utf-8"

    def __init__(self, is_terminal: bool = True) -> None:
        self.written = ""
        self._is_terminal = is_terminal

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self._is_terminal


def test_bars_of_tqdm_redraw_their_line() -> None:
    from tqdm import tqdm

    terminal = _Terminal()
    bar = tqdm(total=3, file=guard(terminal), ncols=60, mininterval=0)  # type: ignore[arg-type]
    for _ in range(3):
        bar.update()
    bar.close()
    assert r"\x0d" not in terminal.written
    assert terminal.written.count("\r") >= 3
    assert terminal.written.endswith("\n")


def test_a_carriage_return_does_not_overwrite_other_text() -> None:
    terminal = _Terminal()
    stream = guard(terminal)  # type: ignore[arg-type]
    print("deleted", "\rkept", "a\rb", file=stream)
    assert terminal.written == "deleted \\x0dkept a\\x0db\n"
    file = _Terminal(is_terminal=False)
    print("\rbar", file=guard(file))  # type: ignore[arg-type]
    assert file.written == "\\x0dbar\n"
