"""The report in Chromium: no error, no request, the language switch."""

import http.server
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from eval.report.page import render_html
from tests.helpers.chromium import CHROMIUM, QUIET, Chromium
from tests.helpers.report_page import HOSTILE, Page, make_data

# What Chromium asks for itself, whatever it is told: updates, the time, accounts.
OF_THE_BROWSER = re.compile(r"(//| )[\w.-]*\.(google|googleapis|gstatic|gvt1)\.com[:/]")


def open_in_browser(folder: Path, html: str) -> tuple[list[str], list[str], str]:
    """Console lines, requests and the final DOM of a page opened in headless Chromium.

    The page comes from a loopback server that is also the browser's proxy, so every request is seen.
    """
    (folder / "page.html").write_text(html, encoding="utf-8")
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_request(self, code: object = "-", size: object = "-") -> None:
            requests.append(f"{self.command} {self.path}")

        def log_error(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *QUIET, "--disable-dev-shm-usage",
        f"--proxy-server={address}", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
        "--virtual-time-budget=2000", "--dump-dom", f"http://{address}/page.html",
    ]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 0, result.stderr
    of_the_page = [line for line in requests if not OF_THE_BROWSER.search(line)]
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return console, of_the_page, result.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_opens_in_a_browser_without_errors_or_requests(tmp_path: Path) -> None:
    console, requests, dom = open_in_browser(tmp_path, render_html(make_data()))
    assert console == []
    assert requests == ["GET /page.html"]
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    assert title[1].startswith("Chinese CLIP run: tiny-rn &lt;script&gt;")
    page = Page(dom)
    assert len(page.scripts) == 1
    assert page.text.count(HOSTILE) > 30


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_browser_check_notices_scripts_and_requests(tmp_path: Path) -> None:
    console, requests, dom = open_in_browser(
        tmp_path,
        "<script>document.title='owned';console.error('seen')</script><img src=http://evil.invalid/x.png>",
    )
    assert "GET http://evil.invalid/x.png" in requests
    assert "<title>owned</title>" in dom
    assert any("seen" in line for line in console)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_language_is_switched_without_loading_and_remembered(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render_html(make_data()), encoding="utf-8")
    shown = "document.querySelector('#scores .{}').offsetWidth > 0"
    with Chromium() as browser:
        browser.send("Page.enable")
        browser.send("Page.navigate", url=f"file://{tmp_path}/page.html")
        browser.wait("document.readyState === 'complete' && document.querySelector('#scores') !== null")
        assert browser.evaluate("document.documentElement.lang") == "en"
        assert browser.evaluate(f"[{shown.format('en')}, {shown.format('zh')}]") == [True, False]
        browser.evaluate("window.sameDocument = true; document.querySelector('[data-language=zh]').click()")
        assert browser.evaluate("document.documentElement.lang") == "zh-CN"
        assert browser.evaluate(f"[{shown.format('en')}, {shown.format('zh')}]") == [False, True]
        assert browser.evaluate("document.title").startswith("Chinese CLIP 训练运行")
        assert browser.evaluate("window.sameDocument")
        pressed = "document.querySelector('[data-language=zh]').getAttribute('aria-pressed')"
        assert browser.evaluate(pressed) == "true"
        browser.send("Page.navigate", url="about:blank")
        browser.send("Page.navigate", url=f"file://{tmp_path}/page.html")
        browser.wait("document.readyState === 'complete' && document.querySelector('#scores') !== null")
        assert browser.evaluate("document.documentElement.lang") == "zh-CN"


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_reaches_beyond_the_window(tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(render_html(make_data()), encoding="utf-8")
    with Chromium() as browser:
        browser.send("Page.enable")
        browser.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        browser.send("Page.navigate", url=f"file://{tmp_path}/page.html")
        browser.wait("document.readyState === 'complete' && document.querySelector('#scores') !== null")
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        # The bar of 24.0% is 24.0% as wide as its axis.
        widths = browser.evaluate(
            "[...document.querySelectorAll('#scores ~ .grid .track')].map((track) =>"
            " track.firstElementChild.getBoundingClientRect().width / track.clientWidth)"
        )
        assert widths[3] == pytest.approx(0.24, abs=0.002)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_in_a_run_is_headed_by_the_folder_of_the_run(tmp_path: Path) -> None:
    page = tmp_path / "<b>我的 run" / "report" / "report.html"
    page.parent.mkdir(parents=True)
    page.write_text(render_html(make_data()), encoding="utf-8")
    with Chromium() as browser:
        browser.send("Page.enable")
        browser.send("Page.navigate", url=page.as_uri())
        browser.wait("document.readyState === 'complete' && document.querySelector('#scores') !== null")
        assert browser.evaluate("document.querySelector('h1').textContent") == "<b>我的 run"
        assert browser.evaluate("document.title") == "<b>我的 run"
