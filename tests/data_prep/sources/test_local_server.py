"""The loopback site answers as its description says, and nothing else."""

import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, IncompleteRead, RemoteDisconnected
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from data_prep.sources.local_server import Answer, read_site, serve, write_site
from pipeline.core.records import InputError


def _make(folder: Path, answers: dict[str, Answer]) -> Path:
    (folder / "site/a").mkdir(parents=True)
    (folder / "site/a/1.jpg").write_bytes(b"picture" * 100)
    (folder / "secret.txt").write_text("secret")
    write_site(folder, answers)
    return folder


PLAIN = {"/a/1.jpg": Answer(file="a/1.jpg")}


def _proxied(proxy: str) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({"http": proxy}))


def test_answers_as_proxy_and_as_plain_server(tmp_path: Path) -> None:
    answers = {
        "/a/1.jpg": Answer(file="a/1.jpg", content_type="image/webp", headers={"X-Robots-Tag": "noai"})
    }
    with serve(_make(tmp_path, answers)) as address:
        for reply in (
            _proxied(address).open("http://corpus.invalid/a/1.jpg", timeout=5),
            urllib.request.urlopen(f"{address}/a/1.jpg", timeout=5),
        ):
            assert reply.read() == b"picture" * 100
            assert reply.headers["Content-Type"] == "image/webp"
            assert reply.headers["X-Robots-Tag"] == "noai"


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://corpus.invalid/gone.jpg", 404),
        ("http://corpus.invalid/broken.jpg", 503),
        ("http://corpus.invalid/a/1.jpg?size=2", 404),
        ("http://elsewhere.invalid/a/1.jpg", 403),
        ("http://corpus.invalid/../secret.txt", 404),
        ("http://corpus.invalid/%2e%2e/secret.txt", 404),
        ("http://corpus.invalid/site.json", 404),
    ],
)
def test_errors_have_their_status(tmp_path: Path, url: str, status: int) -> None:
    with (
        serve(_make(tmp_path, {**PLAIN, "/broken.jpg": Answer(status=503)})) as address,
        pytest.raises(urllib.error.HTTPError) as caught,
    ):
        _proxied(address).open(url, timeout=5)
    assert caught.value.code == status


def test_connections_break_where_they_should(tmp_path: Path) -> None:
    answers = {
        "/half.jpg": Answer(file="a/1.jpg", sent_share=0.5),
        "/silent.jpg": Answer(file="a/1.jpg", sent_share=0),
    }
    with serve(_make(tmp_path, answers)) as address:
        with pytest.raises(IncompleteRead) as caught:
            urllib.request.urlopen(f"{address}/half.jpg", timeout=5).read()
        assert len(caught.value.partial) == 350
        with pytest.raises(RemoteDisconnected):
            urllib.request.urlopen(f"{address}/silent.jpg", timeout=5)


def test_a_hanging_answer_times_out_and_does_not_delay_the_end(tmp_path: Path) -> None:
    with serve(_make(tmp_path, {"/hang.jpg": Answer(hang=True)})) as address:
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"{address}/hang.jpg", timeout=0.3)
        parts = urlsplit(address)
        waiting = HTTPConnection(str(parts.hostname), parts.port, timeout=30)
        waiting.request("GET", "/hang.jpg")
        start = time.monotonic()
    assert time.monotonic() - start < 2
    with pytest.raises((RemoteDisconnected, ConnectionResetError)):
        waiting.getresponse()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((str(parts.hostname), parts.port or 0), timeout=1)


def test_many_clients_at_once(tmp_path: Path) -> None:
    with serve(_make(tmp_path, PLAIN)) as address:
        barrier = threading.Barrier(32)

        def fetch(_: int) -> int:
            barrier.wait()
            return sum(len(urllib.request.urlopen(f"{address}/a/1.jpg", timeout=10).read()) for _ in range(5))

        with ThreadPoolExecutor(32) as pool:
            assert list(pool.map(fetch, range(32))) == [3500] * 32


def test_a_description_survives_the_file(tmp_path: Path) -> None:
    answers = {
        "/a/1.jpg": Answer(file="a/1.jpg", headers={"X-Robots-Tag": "noai"}),
        "/x": Answer(status=500, content_type="text/html", hang=True, sent_share=0.25),
    }
    assert read_site(_make(tmp_path, answers)) == answers


def test_files_outside_the_site_are_refused(tmp_path: Path) -> None:
    _make(tmp_path, {"/a/1.jpg": Answer(file="../secret.txt")})
    with pytest.raises(InputError, match=r"site\.json: /a/1\.jpg names '\.\./secret\.txt', which is outside"):
        read_site(tmp_path)


def test_a_missing_or_malformed_description_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"site\.json: no such file"):
        read_site(tmp_path)
    (tmp_path / "site.json").write_text('{"/a": {"colour": "red"}}')
    with pytest.raises(InputError, match=r"site\.json: not a site description .*colour"):
        read_site(tmp_path)
