"""Markdown pages of the project, taken apart: headings, links, code blocks, tables."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Every page that is written by hand or generated; the changelog tells of the past.
PAGES = tuple(
    sorted(
        path.relative_to(ROOT).as_posix()
        for path in (
            *ROOT.glob("*.md"),
            *(ROOT / "docs").rglob("*.md"),
            *(ROOT / "benchmarks").rglob("*.md"),
        )
    )
)
# A Chinese page and the English one that it is held equal to.
CHINESE = {
    "README.zh-CN.md": "README.md",
    "docs/zh/getting-started.md": "docs/getting-started.md",
    "docs/zh/your-data.md": "docs/guides/your-data.md",
    "docs/zh/train.md": "docs/guides/train.md",
    "docs/zh/evaluate.md": "docs/guides/evaluate.md",
}
NOT_RUN, SLOW = "<!-- not run: ", "<!-- run by make test-slow -->"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, the line above it and where it begins."""

    language: str
    text: str
    above: str
    line: int


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """Return all fenced blocks in order."""
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].splitlines()
        found.append(Block(match[1], match[2], before[-1] if before else "", len(before) + 1))
    return found


def prose(text: str) -> str:
    """Return a page without its fenced blocks, comments and inline code."""
    text = re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.DOTALL)
    return re.sub(r"``.*?``|`[^`\n]*`", "`…`", text)


def headings(text: str) -> list[tuple[int, str]]:
    """Return level and title of every heading in order."""
    found = re.findall(r"^(#+) (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return [(len(marks), title) for marks, title in found]


def anchors(text: str) -> set[str]:
    """Return the anchors that a hub gives a page's headings."""
    plain = (re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title) for _, title in headings(text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def links(text: str) -> list[str]:
    """Return the targets of a page's links and images."""
    return _LINK.findall(_FENCE.sub("", text))


def tables(text: str) -> list[list[list[str]]]:
    """Return the tables of a page: rows of cells, without the line under the head."""
    found: list[list[list[str]]] = [[]]
    for line in _FENCE.sub("", text).splitlines():
        if not line.startswith("|"):
            found += [[]] if found[-1] else []
        elif not re.fullmatch(r"[|\- ]+", line):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [table for table in found if table]
