"""The Chinese pages say what the English ones say: same headings, code, links and figures."""

import os
import re
from hashlib import sha256

import pytest

from tests.helpers.pages import CHINESE, ROOT, blocks, headings, links, read, tables

PAIRS = sorted(CHINESE.items())
pairs = pytest.mark.parametrize(("chinese", "english"), PAIRS)


def _digest_line(english: str) -> str:
    return f"<!-- follows {english} {sha256(read(english).encode()).hexdigest()[:16]} -->"


def _targets(page: str) -> list[str]:
    """What a page links to, by path in the repository; a Chinese page counts as its English one."""
    found = []
    for link in links(read(page)):
        target = link.partition("#")[0]
        if not link.startswith(("https://", "http://")):
            path = os.path.normpath(os.path.join(os.path.dirname(page), target)) if target else page
            target = CHINESE.get(path, path)
        found.append(target)
    return sorted(found)


def _without_comments(text: str) -> list[str]:
    return [re.sub(r"(^|\s+)#.*$", "", line) for line in text.splitlines()]


@pairs
def test_headings_have_the_same_levels(chinese: str, english: str) -> None:
    assert [level for level, _ in headings(read(chinese))] == [level for level, _ in headings(read(english))]


@pairs
def test_code_blocks_are_the_same_save_comments(chinese: str, english: str) -> None:
    def code(page: str) -> list[tuple[str, str, list[str]]]:
        return [(block.language, block.above if block.above.startswith("<!--") else "",
                 _without_comments(block.text)) for block in blocks(read(page))]  # fmt: skip

    assert code(chinese) == code(english)


@pairs
def test_links_lead_to_the_same_pages(chinese: str, english: str) -> None:
    own = CHINESE[chinese]
    theirs = [target for target in _targets(english) if target != own]
    assert [target for target in _targets(chinese) if target != own] == theirs


@pairs
def test_tables_have_the_same_figures(chinese: str, english: str) -> None:
    def figures(page: str) -> list[list[list[list[str]]]]:
        return [
            [[re.findall(r"\d[\d,.]*\d|\d", cell) for cell in row] for row in table]
            for table in tables(read(page))
        ]

    assert figures(chinese) == figures(english)


@pairs
def test_the_chinese_page_follows_this_english_one(chinese: str, english: str) -> None:
    last = read(chinese).rstrip().splitlines()[-1]
    assert last == _digest_line(english), (
        f"{chinese}: put the change into Chinese, then end it with this line"
    )


def test_every_chinese_page_is_held() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "zh").glob("*.md")}
    assert found | {"README.zh-CN.md"} == set(CHINESE)
