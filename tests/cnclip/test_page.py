"""The examples of docs/guides/python-api.md, run in order, give the outputs that the page shows."""

import doctest
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "python-api.md"
_NEEDS_A_RUN = "## Run a recipe"


def _wrong(text: str) -> int:
    test = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 5
    return doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(test).failed


def test_examples_that_need_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _wrong(PAGE.read_text(encoding="utf-8").partition(_NEEDS_A_RUN)[0]) == 0


@pytest.mark.slow
def test_all_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _wrong(PAGE.read_text(encoding="utf-8")) == 0
