"""The search page in Chromium."""

import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.chromium import CHROMIUM, Chromium
from tests.helpers.evaluation_files import png_bytes
from tests.helpers.search_site import HOSTILE, NUM_IMAGES, NUM_SAMPLES, Site, results

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

CARDS = "document.querySelectorAll('#results li')"
STATUS = "document.getElementById('status').textContent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        browser.send("Page.enable")
        yield browser


def visit(browser: Chromium, site: Site, fragment: str = "") -> None:
    browser.send("Page.navigate", url="about:blank")  # a new fragment alone would not load the page again
    browser.send("Page.navigate", url=f"{site.server.url}{fragment}")
    browser.wait("document.readyState === 'complete' && document.getElementById('about')?.textContent")


def all_images_shown(browser: Chromium) -> bool:
    browser.wait("[...document.images].every((image) => image.complete)")
    return bool(browser.evaluate(f"[...{CARDS}].every((card) => card.querySelector('img').naturalWidth > 0)"))


@needs_chromium
def test_typing_shows_images_with_scores_captions_and_sources(browser: Chromium, site: Site) -> None:
    visit(browser, site)
    browser.type("红色的猫")
    assert browser.wait(f"{CARDS}.length") == NUM_IMAGES
    shown = browser.evaluate(f"[...{CARDS}].map((card) => card.innerText)")
    for text, item in zip(shown, results(site, q="红色的猫"), strict=True):
        assert f"{item['score']:.3f}" in text
        assert item["captions"][0] in text
        assert item["source"] in text
    assert browser.evaluate(STATUS) == "12 images, nearest first"
    browser.evaluate(f"[...{CARDS}].forEach((card) => {{ card.querySelector('img').loading = 'eager' }})")
    assert all_images_shown(browser)
    assert urllib.parse.unquote(browser.evaluate("location.hash")) == "#q=红色的猫&gallery=small"
    assert (
        browser.evaluate(f"getComputedStyle({CARDS}[0]).borderTopLeftRadius") == "12px"
    )  # our style applies


@needs_chromium
def test_captions_and_addresses_are_shown_as_text(browser: Chromium, site: Site) -> None:
    visit(browser, site, "#q=%E7%8C%AB")
    browser.wait(f"{CARDS}.length")
    captions = browser.evaluate("[...document.querySelectorAll('.caption')].map((line) => line.textContent)")
    assert HOSTILE in captions
    visit(browser, site, "#q=%E7%8C%AB&gallery=shards.index")
    assert browser.wait(f"{CARDS}.length") == NUM_SAMPLES
    links = browser.evaluate("[...document.querySelectorAll('#results a')].map((link) => link.href)")
    assert links == ["https://pictures.example/5?a=b&c=%3Cd%3E"]
    assert "javascript:window.hostile=3" in browser.evaluate("document.getElementById('results').innerText")
    assert browser.evaluate("document.querySelectorAll('#results script, #results .caption *').length") == 0
    assert browser.evaluate("typeof window.hostile") == "undefined"


@needs_chromium
def test_an_image_is_chosen_or_dropped(browser: Chromium, site: Site, tmp_path: Path) -> None:
    for seed in (6, 9):
        (tmp_path / f"{seed}.png").write_bytes(png_bytes(seed))
    visit(browser, site)
    root = browser.send("DOM.getDocument")["root"]["nodeId"]
    node = browser.send("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.send("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / "6.png")])
    browser.wait(f"{CARDS}[0]?.innerText.includes('small, image 106')")
    assert "1.000" in browser.evaluate(f"{CARDS}[0].innerText")
    assert browser.wait("document.getElementById('preview').naturalWidth") == 20
    browser.drop(str(tmp_path / "9.png"), 300, 300)
    browser.wait(f"{CARDS}[0]?.innerText.includes('small, image 109')")
    (tmp_path / "no.png").write_bytes(b"no image")
    browser.drop(str(tmp_path / "no.png"), 300, 300)
    browser.wait(f"{STATUS}.includes('unsupported image')")
    assert browser.evaluate(f"{CARDS}.length") == 0


@needs_chromium
def test_nothing_found_and_nothing_asked(browser: Chromium, site: Site) -> None:
    visit(browser, site, "#q=%E7%8C%AB&least=1")
    browser.wait(f"{STATUS} === 'nothing found'")
    assert browser.evaluate(f"{CARDS}.length") == 0
    visit(browser, site)
    browser.type("")
    browser.wait(f"{STATUS} === 'type a text or give an image'")
