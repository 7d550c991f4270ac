"""Every path that CONTRIBUTING.md names exists."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def _quoted() -> Iterator[str]:
    """Yield paths in backticks; those with NAME in them stand for files to come."""
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    for path in re.findall(r"`([\w.-]+/[\w./-]*)`", prose):
        if "NAME" not in path:
            yield path


def _drawn() -> Iterator[str]:
    """Yield the folders and modules of the diagram: a folder's line, then one line for each module in it."""
    picture = re.search(r"\n\n```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert picture is not None
    top = ""
    for line in re.sub(r",\n {6,}", ", ", picture[1]).splitlines():  # a long list goes on in the next line
        if not line.startswith(" "):
            top = line.split()[0].rstrip("/")
            yield top
            continue
        folder, names = line.split(maxsplit=1)
        inside = top if folder == "." else f"{top}/{folder.rstrip('/')}"
        yield inside
        yield from (f"{inside}/{name}" for name in names.split(", "))


@pytest.mark.parametrize("path", sorted({*_quoted(), *_drawn()}))
def test_the_path_exists(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / f"{path}.py").is_file(), (
        f"CONTRIBUTING.md: {path} does not exist"
    )


def test_the_picture_is_whole() -> None:
    drawn = set(_drawn())
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for package in ("pipeline", "data_prep", "training", "eval")
        for path in (ROOT / package).rglob("*.py")
    }
    lists = {f"eval/{name}{below}" for name in ("labels_zh", "templates_zh") for below in ("", "/paper")}
    assert folders - drawn == lists
