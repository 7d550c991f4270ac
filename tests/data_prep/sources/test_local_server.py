"""The loopback site answers as its description says, and nothing else."""

import os
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


def _ask(address: str, path: str, host: str | None = None) -> int:
    """Return the status of a request with another Host header."""
    connection = HTTPConnection(urlsplit(address).netloc, timeout=5)
    connection.putrequest("GET", path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 200 or answer.read() == b""
    connection.close()
    return answer.status


def test_only_those_who_know_the_token_are_answered_and_under_its_own_names(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/notes.txt").write_bytes(b"private")
    with serve(
        _make(tmp_path, PLAIN), {"own": str(tmp_path / "own")}, {"own": str(tmp_path / "own")}
    ) as address:
        port, token = urlsplit(address).port, urlsplit(address).path
        paths = ("/a/1.jpg", "/pictures/own/notes.txt", "/packed/own/notes.txt?offset=0&size=3")
        for path in paths:
            for host in ("corpus.invalid", f"127.0.0.1:{port}"):
                assert _ask(address, token + path, host) == 200
            for host in ("evil.example", f"localhost.evil.example:{port}", "corpus.invalid.", "", None):
                assert _ask(address, token + path, host) == 403
            for wrong in ("", "/", f"{token[:-1]}", f"{token}x", f"/{'x' * 32}"):
                assert _ask(address, wrong + path, "corpus.invalid") == 403
            assert _ask(address, f"http://corpus.invalid{path}", "corpus.invalid") == 403
    with serve(_make(tmp_path / "b", PLAIN)) as other:
        assert urlsplit(other).path != token


def test_files_that_never_end_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").write_bytes(b"abc")
    with serve(None, {"own": str(tmp_path)}, {"own": str(tmp_path)}) as address:
        token = urlsplit(address).path
        for path in ("/pictures/own/pipe", "/packed/own/pipe?offset=0&size=3"):
            assert _ask(address, token + path, "corpus.invalid") == 404
        for asked in (
            "offset=0&size=4",
            "offset=-1&size=1",
            f"offset=0&size={1 << 40}",
            f"offset={1 << 70}&size=1",
        ):
            assert _ask(address, f"{token}/packed/own/a?{asked}", "corpus.invalid") == 404


def test_answers_with_type_and_headers(tmp_path: Path) -> None:
    answers = {
        "/a/1.jpg": Answer(file="a/1.jpg", content_type="image/webp", headers={"X-Robots-Tag": "noai"})
    }
    with serve(_make(tmp_path, answers)) as address:
        reply = urllib.request.urlopen(f"{address}/a/1.jpg", timeout=5)
        assert reply.read() == b"picture" * 100
        assert reply.headers["Content-Type"] == "image/webp"
        assert reply.headers["X-Robots-Tag"] == "noai"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/gone.jpg", 404),
        ("/broken.jpg", 503),
        ("/a/1.jpg?size=2", 404),
        ("/../secret.txt", 404),
        ("/%2e%2e/secret.txt", 404),
        ("/site.json", 404),
    ],
)
def test_errors_have_their_status(tmp_path: Path, path: str, status: int) -> None:
    with (
        serve(_make(tmp_path, {**PLAIN, "/broken.jpg": Answer(status=503)})) as address,
        pytest.raises(urllib.error.HTTPError) as caught,
    ):
        urllib.request.urlopen(f"{address}{path}", timeout=5)
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
        waiting.request("GET", f"{parts.path}/hang.jpg")
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
