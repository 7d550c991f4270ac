"""Links and anchors lead somewhere, paths exist, the README is short, and the words are the project's."""

import os
import re

import pytest

from tests.helpers.pages import CHINESE, PAGES, ROOT, anchors, headings, links, prose, read

# Pages whose branch is still to come: each leaves this list with the commit that adds it.
FOLDERS = ("pipeline", "data_prep", "training", "eval", "benchmarks", "deepspeed_configs", "docs", "tests")
FORBIDDEN = {
    r"(?i)\bpictures?\b": "image",
    r"(?i)\bjournal\b": "metrics",
    r"(?i)\bmend(s|ed|ing)?\b": "repair",
    r"(?i)\bgo(es)? on\b|\bwent on\b": "resume, continue",
    r"(?i)\bbeside\b": "next to, compared with, than",
    r"\b(Read|Taken|Given|Kept|Found) are\b": "subject first",
    r"\bis said\b|\bis named\b|\bis told\b": "name the actor",
    r"\d [%]": "3%, without a space",
}
WRITTEN = [page for page in PAGES if page not in CHINESE and page.startswith(("README", "docs/", "CONTRIB"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page: str) -> None:
    text = read(page)
    for link in links(text):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(page), target)) if target else page
        assert (ROOT / path).exists(), f"{page}: {link}: there is no {path}"
        if anchor:
            assert anchor in anchors(read(path)), f"{page}: {link}: {path} has no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith(("README", "docs/"))])
def test_paths_of_the_code_exist(page: str) -> None:
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", read(page)):
        assert (ROOT / path).exists(), f"{page}: there is no {path}"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readme_is_short(page: str) -> None:
    lines = read(page).splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("page", WRITTEN)
def test_the_words_are_the_projects(page: str) -> None:
    text = prose(read(page))
    for pattern, better in FORBIDDEN.items():
        found = re.search(pattern, text)
        assert found is None, f"{page}: {found[0]!r}: write {better}" if found else ""


def test_every_page_is_in_the_index() -> None:
    listed = {
        os.path.normpath(os.path.join("docs", link.partition("#")[0]))
        for link in links(read("docs/README.md"))
    }
    pages = {page for page in PAGES if page.startswith("docs/") and not page.startswith("docs/zh/")}
    assert pages - listed == {"docs/README.md"}


def test_images_are_small() -> None:
    images = sorted((ROOT / "docs" / "images").glob("*.png"))
    assert [path.name for path in images] == ["report.png", "search.png"]
    assert all(path.stat().st_size < 300_000 for path in images)


def test_docstrings_name_pages_and_headings_that_exist() -> None:
    found = 0
    for folder in ("pipeline", "data_prep", "training", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for page, heading in re.findall(r'(docs/[\w/-]+\.md)(?:,\s+"([^"]+)")?', text):
                found += 1
                assert (ROOT / page).is_file(), f"{path}: there is no {page}"
                if heading:
                    titles = [title for _, title in headings(read(page))]
                    assert heading in titles, f"{path}: {page} has no heading {heading!r}"
    assert found > 5
