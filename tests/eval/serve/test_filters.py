"""Filters by source and "more like this", over HTTP and in the page; a link restores what it shows."""

import json
import urllib.parse
from collections.abc import Iterator

import numpy as np
import polars as pl
import pytest

from eval.serve import sources as sources_module
from eval.serve.sources import Sources
from tests.helpers.chromium import CHROMIUM, Chromium
from tests.helpers.search_site import NUM_SAMPLES, THEIRS, Site, ask, results

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
CARDS = "document.querySelectorAll('#results li')"
STATUS = "document.getElementById('status').textContent"


def test_only_images_of_the_source_are_found(site: Site) -> None:
    everything = results(site, q="红色的猫", gallery=1)
    theirs = results(site, q="红色的猫", gallery=1, source=THEIRS)
    assert len(theirs) == 4
    assert all(item["source"].startswith(f"{THEIRS}, shard ") for item in theirs)
    assert theirs == [item for item in everything if item["source"].startswith(THEIRS)]
    best = results(site, q="红色的猫", gallery=1, source=THEIRS, k=2)
    assert best == theirs[:2]
    mine = results(site, q="红色的猫", gallery=1, source="mine")
    # One row of the index is in no shard: it is of neither source.
    assert {item["row"] for item in mine} | {item["row"] for item in theirs} == {*range(NUM_SAMPLES - 1)}


def test_sources_are_listed_with_their_rows_and_others_refused(site: Site) -> None:
    galleries = json.loads(ask(site, "/api/about")[2])["galleries"]
    assert galleries[0]["sources"] == []
    assert galleries[1]["sources"] == [{"name": "mine", "rows": 9}, {"name": THEIRS, "rows": 4}]
    for gallery, source in ((1, "nobody's"), (0, "mine")):
        query = urllib.parse.urlencode({"q": "猫", "gallery": gallery, "source": source})
        status, _, data = ask(site, f"/api/search?{query}")
        assert (status, json.loads(data)) == (400, {"error": "the gallery has no such source"})


def test_more_like_one_of_the_gallery(site: Site) -> None:
    found = results(site, row=5, k=3)
    image_ND = np.load(site.folder / "run/embed/small/stage1/img_emb/img_emb_0.npy")
    scores = image_ND @ image_ND[5]
    scores[5] = -2  # it is not among its own results
    assert [item["row"] for item in found] == np.argsort(-scores)[:3].tolist()
    assert found[0]["score"] == pytest.approx(scores.max(), abs=1e-4)
    theirs = results(site, row=0, gallery=1, source=THEIRS)
    assert len(theirs) == 3  # row 0 is theirs too
    for row, status in (("99", 400), ("x", 400), ("-1", 400)):
        assert ask(site, f"/api/search?row={row}")[0] == status


def test_a_rare_source_is_looked_for_in_ever_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "MAX_LOOKED_AT", 64)
    names = pl.Series("source", ["common"] * 95 + ["rare", None, "rare", "common", "rare"])
    sources = Sources.of(names)
    assert sources is not None
    assert sources.counts == {"common": 96, "rare": 3, "": 1}
    assert sources.codes.dtype == np.uint8
    assert sources.largest(9) == [{"name": "common", "rows": 96}, {"name": "rare", "rows": 3}]
    asked = []

    def search(order: list[int], query_1D: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(k)
        rows = np.array(order[:k])
        return -np.arange(float(len(rows)))[None], rows[None]

    query = np.zeros(4, np.float32)
    far = sources.nearest(lambda q, k: search([*range(30), 97, *range(30, 97)], q, k), query, 2, "rare")
    assert (far.pairs, far.is_cut) == ([(97, -30.0)], True)  # another may lie beyond the 64
    assert asked == [8, 32, 64]
    near = sources.nearest(lambda q, k: search([99, 1, 95, 97, *range(90)], q, k), query, 9, "rare")
    assert (near.pairs, near.is_cut) == ([(99, 0.0), (95, -2.0), (97, -3.0)], False)
    assert Sources.of(pl.Series("source", ["one"] * 5)) is None


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        browser.send("Page.enable")
        yield browser


def visit(browser: Chromium, site: Site, fragment: str = "") -> None:
    browser.send("Page.navigate", url="about:blank")  # a new fragment alone would not load the page again
    browser.send("Page.navigate", url=f"{site.server.url}{fragment}")
    browser.wait("document.readyState === 'complete' && document.getElementById('about')?.textContent")


def choose(browser: Chromium, name: str, value: str) -> None:
    browser.evaluate(
        f"document.getElementById('{name}').value = {json.dumps(value)};"
        f"document.getElementById('{name}').dispatchEvent(new Event('change'))"
    )


@needs_chromium
def test_a_link_restores_what_was_searched(browser: Chromium, site: Site) -> None:
    visit(browser, site)
    assert browser.evaluate("document.getElementById('filter').hidden")
    choose(browser, "gallery", "1")
    assert not browser.evaluate("document.getElementById('filter').hidden")
    browser.type("红色的猫")
    browser.wait(f"{CARDS}.length === {NUM_SAMPLES}")
    choose(browser, "source", THEIRS)
    browser.wait(f"{CARDS}.length === 4")
    choose(browser, "k", "3")
    browser.wait(f"{CARDS}.length === 3")
    link = browser.evaluate("location.hash")
    fields = urllib.parse.parse_qs(link.removeprefix("#"))
    assert fields == {"q": ["红色的猫"], "gallery": ["shards.index"], "source": [THEIRS], "k": ["3"]}
    assert not browser.evaluate("document.getElementById('share').hidden")
    shown = browser.evaluate("document.getElementById('results').innerText")
    visit(browser, site, link)
    browser.wait(f"{CARDS}.length === 3")
    assert browser.evaluate("document.getElementById('results').innerText") == shown
    state = "['text', 'gallery', 'source', 'k'].map((id) => document.getElementById(id).value)"
    assert browser.evaluate(state) == ["红色的猫", "1", THEIRS, "3"]


@needs_chromium
def test_more_like_this_is_a_link_and_goes_by_keys(browser: Chromium, site: Site) -> None:
    visit(browser, site, "#q=%E7%8C%AB&gallery=small&k=6")
    browser.wait(f"{CARDS}.length === 6")
    first, second = (item["row"] for item in results(site, q="猫", k=2))
    press = "document.dispatchEvent(new KeyboardEvent('keydown', {{ key: '{}' }}))"
    browser.evaluate("document.getElementById('text').focus();" + press.format("ArrowDown"))
    browser.evaluate(press.format("ArrowRight"))
    focused = f"[...{CARDS}].indexOf(document.activeElement.closest('li'))"
    assert browser.evaluate(focused) == 1
    browser.evaluate("document.activeElement.click()")
    browser.wait(f"location.hash.includes('like={second}') && !{STATUS}.includes('…')")
    expected = [f"{item['score']:.3f}" for item in results(site, row=second, k=6)]
    scores = f"[...{CARDS}].map((card) => card.querySelector('b').textContent)"
    browser.wait(f"{scores}.join() === '{','.join(expected)}'")
    assert browser.evaluate("document.getElementById('queried').textContent") == "images like this one"
    link = browser.evaluate("location.hash")
    visit(browser, site, link)
    browser.wait(f"{scores}.join() === '{','.join(expected)}'")
    browser.evaluate("document.activeElement.blur();" + press.format("/"))
    assert browser.evaluate("document.activeElement.id") == "text"
    assert first != second


@needs_chromium
def test_the_controls_are_in_both_languages(browser: Chromium, site: Site) -> None:
    visit(browser, site, "#q=%E7%8C%AB&gallery=shards.index&source=mine")
    browser.wait(f"{CARDS}.length === 9")
    assert browser.evaluate("JSON.stringify(Object.keys(words.en)) === JSON.stringify(Object.keys(words.zh))")
    used = browser.evaluate("[...document.querySelectorAll('[data-say]')].map((node) => node.dataset.say)")
    assert {*used} <= {*browser.evaluate("Object.keys(words.en)")}
    browser.evaluate("document.querySelector('[data-language=zh]').click()")
    assert browser.evaluate("document.documentElement.lang") == "zh-CN"
    assert browser.evaluate("document.title") == "以文搜图"
    assert browser.evaluate(STATUS) == "9 张图片，由近到远"
    assert browser.evaluate("document.getElementById('go').textContent") == "搜索"
    assert browser.evaluate("document.querySelector('#results .like').textContent") == "相似图片"
    assert browser.evaluate("document.getElementById('source').value") == "mine"
    visit(browser, site)
    assert browser.evaluate("document.documentElement.lang") == "zh-CN"  # remembered
    browser.evaluate("localStorage.clear()")


@needs_chromium
def test_a_phone_shows_the_page_without_scrolling_sideways(browser: Chromium, site: Site) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.send("Emulation.setDeviceMetricsOverride", **size)
    try:
        visit(browser, site, "#q=%E7%8C%AB&gallery=shards.index")
        browser.wait(f"{CARDS}.length === {NUM_SAMPLES}")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.evaluate(f"{CARDS}[0].offsetTop === {CARDS}[1].offsetTop")  # two in a row
    finally:
        browser.send("Emulation.clearDeviceMetricsOverride")
