"""Help pages, wrong command lines, completion and colour: what a newcomer sees of every command."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main, program, reference
from pipeline.cli.help import page_of
from pipeline.core.terminal import Verbosity, verbosity
from tests.helpers.pseudo_terminal import run_in_terminal

ROOT = Path(__file__).parents[3]
COMMANDS = [name for name, command in program().commands.items() if not command.hidden]
ESCAPE = "\x1b"


def _ends(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a command line that ends while it is read."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_parses(name: str) -> None:
    command = program().commands[name]
    example = shlex.split(command.epilog.removeprefix("Example: "))
    assert example[:2] == ["cnclip", name]
    context = command.make_context(name, example[2:])
    assert context.args == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_says_all(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = _ends(capsys, name, "--help")
    lines = out.splitlines()
    assert status == 0
    assert max(len(line) for line in lines if not line.startswith("Example")) <= 80
    assert not any(line != line.rstrip() for line in lines)
    said = " ".join(out.split())
    page = page_of(program().commands[name], f"cnclip {name}")
    for rows in page.sections.values():
        for option, text in rows:
            assert option in out
            assert text, option
            assert " ".join(text.split()) in said, option
    assert ESCAPE not in out


def test_help_texts_are_imperative_and_short() -> None:
    for name in COMMANDS:
        command = program().commands[name]
        assert re.match(r"[a-z]+ ", command.short_help), name
        assert len(command.short_help) <= 90, name
        assert not command.short_help.endswith("."), name


def test_a_wide_terminal_gets_lines_of_100_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    _, out, _ = _ends(capsys, "eval", "-h")
    assert 80 < max(map(len, out.splitlines())) <= 100


def test_cnclip_alone_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, alone, _ = _ends(capsys)
    assert status == 0
    assert _ends(capsys, "--help")[1] == alone
    headings = re.findall(r"^(Run|Corpus|Weights|Evaluate|Search)$", alone, re.MULTILINE)
    assert headings == ["Run", "Corpus", "Weights", "Evaluate", "Search"]
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", alone, re.MULTILINE), name


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _ends(capsys, "--version")
    assert status == 0
    assert re.fullmatch(r"cnclip \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plann demo", "plann: no such command; did you mean plan?"),
        ("xyzzy", "xyzzy: no such command; see `cnclip --help`"),
        ("plan demo --hardwar A100", "--hardwar: no such option; did you mean --hardware?"),
        ("run demo --reppair", "--reppair: no such option; did you mean --repair?"),
        ("run demo --men", "--men: no such option; see `cnclip run --help`"),  # --mend is hidden
        ("plan demo --samples few", "--samples: few: expected a whole number"),
        ("plan demo --utilisation much", "--utilisation: much: expected a number"),
        (
            "embed demo --out x --dtype float61",
            "--dtype: float61: choose from float16, float32; did you mean",
        ),
        ("plan", "RUN.toml: missing; see `cnclip plan --help`"),
        ("reshard runs/a --samples 3", "--out: missing"),
        ("plan demo --samples", "option '--samples' requires an argument; see `cnclip plan --help`"),
        ("negation a b --pair x y", "--pair: takes three values: CLASS PLAIN NEGATED"),
        ("status demo -n 0", "-n: 0: "),
        ("plan demo more", "got unexpected extra argument(s) (more)"),
    ],
)
def test_wrong_usage_is_one_line_with_a_remedy(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = _ends(capsys, *line.split())
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert said in err
    assert err.endswith("--help`\n")


def test_general_options_stand_before_and_behind_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-v", "plan", "none.toml"], ["plan", "none.toml", "-v"]):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("error: none.toml: no such file")
    assert main(["plan", "none.toml"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert verbosity() == Verbosity.NORMAL  # a later command begins anew


def test_no_colour_leaks_into_the_next_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["plan", "none.toml", "--no-color"])
    assert "NO_COLOR" not in os.environ


@pytest.mark.parametrize(
    ("words", "environment", "is_coloured"),
    [
        ((), {}, True),
        ((), {"NO_COLOR": "1"}, False),
        (("--no-color",), {}, False),
    ],
)
def test_colour_only_on_a_terminal_and_if_wanted(
    words: tuple[str, ...], environment: dict[str, str], is_coloured: bool
) -> None:
    command = [sys.executable, "-m", "pipeline", *words, "plan", "--help"]
    shown = run_in_terminal(command, environment=environment).text
    assert "Usage: " in shown
    assert (ESCAPE in shown) == is_coloured
    if is_coloured:
        piped = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert ESCAPE not in piped.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_its_script(shell: str) -> None:
    environment = {**os.environ, "_CNCLIP_COMPLETE": f"source_{shell}"}
    command = [sys.executable, "-m", "pipeline"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    assert f"complete_{shell}" in done.stdout
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def test_completion_is_installed_for_the_shell_that_asks(tmp_path: Path) -> None:
    shell = shutil.which("bash")
    assert shell is not None
    command = [shell, "--norc", "-c", f"{sys.executable} -m pipeline --install-completion; true"]
    shown = run_in_terminal(command, environment={"HOME": str(tmp_path)})
    script = tmp_path / ".bash_completions" / "cnclip.sh"
    assert shown.lines()[0].startswith("bash completion installed in ")
    assert "complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cnclip st", {"status"}),
        ("cnclip plan paper_", {"paper_corpus", "paper_corpus_336", "paper_corpus_larger"}),
        ("cnclip plan demo --hard", {"--hardware"}),
        ("cnclip export runs/a --to l", {"lmdb"}),
        ("cnclip run demo --m", set()),  # hidden
    ],
)
def test_completion_knows_commands_options_recipes_and_choices(line: str, found: set[str]) -> None:
    environment = {
        **os.environ,
        "_CNCLIP_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    command = [sys.executable, "-m", "pipeline"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    assert set(done.stdout.split()) == found


def test_the_reference_is_what_the_commands_say() -> None:
    page = (ROOT / reference.PATH).read_text(encoding="utf-8")
    assert page == reference.reference(), "write it anew: python -m pipeline.cli.reference"


def test_help_needs_no_heavy_package() -> None:
    code = (
        "import sys; from pipeline.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'polars', 'faiss', 'transformers', 'deepspeed', 'fsspec', 'pyarrow', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "[]\n"


def test_markup_in_a_help_text_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = _ends(capsys, "eval", "--help")
    assert "including [CLS] and [SEP]" in " ".join(out.split())
