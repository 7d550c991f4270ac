"""Take the images of the README from a finished run: `python -m tests.helpers.screenshots demo`.

Needs Chromium. Run it from the folder that the run's TOML takes its paths from.
"""

import base64
import subprocess
import sys
import time
from pathlib import Path

from pipeline.catalog import load
from tests.helpers.chromium import Chromium
from tests.helpers.pages import ROOT

WIDTH_PX, HEIGHT_PX = 1100, 780
QUERY = "一个红色的圆形"
PORT = 18_765
_SETTLE_SECONDS = 2.0  # images that a page asks for after it is loaded


def _take(tab: Chromium, name: str) -> None:
    time.sleep(_SETTLE_SECONDS)
    image = base64.b64decode(tab.send("Page.captureScreenshot", format="png")["data"])
    path = ROOT / "docs" / "images" / name
    path.write_bytes(image)
    print(f"{path}: {len(image):,} bytes")


def take(recipe: str) -> None:
    """Write docs/images/report.png and search.png."""
    run, _ = load(recipe)
    report = Path(run.folder, "report", "report.html").resolve()
    command = [sys.executable, "-m", "pipeline", "serve", recipe, "--port", str(PORT)]
    with Chromium() as tab, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            tab.send(
                "Emulation.setDeviceMetricsOverride",
                width=WIDTH_PX, height=HEIGHT_PX, deviceScaleFactor=1, mobile=False,
            )  # fmt: skip
            tab.send("Page.navigate", url=report.as_uri())
            tab.wait("document.readyState === 'complete'")
            _take(tab, "report.png")
            assert server.stdout is not None
            while "http://" not in (line := server.stdout.readline()):
                if not line:
                    raise SystemExit(f"{recipe}: the search page did not start")
            tab.send("Page.navigate", url=f"http://127.0.0.1:{PORT}/")
            tab.wait("document.readyState === 'complete'")
            tab.wait("document.querySelector('input[type=search]') !== null")
            tab.evaluate("document.querySelector('input[type=search]').focus()")
            tab.type(QUERY)
            tab.wait("document.images.length > 3")
            _take(tab, "search.png")
        finally:
            server.terminate()


if __name__ == "__main__":
    take(sys.argv[1])
