"""Untrusted clients of the search page: every answer is complete, bounded and of the same form."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from eval.serve import connections
from eval.serve.server import Searcher, SearchServer
from tests.helpers.evaluation_files import png_bytes
from tests.helpers.search_site import Site, ask


@contextlib.contextmanager
def served(site: Site) -> Iterator[SearchServer]:
    with SearchServer(Searcher(site.encoder, site.galleries), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def raw(port: int, request: bytes, seconds: float = 30) -> bytes:
    """All bytes that a connection answers with until it is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(request)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(1 << 16):
                found += chunk
        return found


def test_malformed_addresses_and_origins_are_bad_requests(site: Site) -> None:
    port = site.server.server_port
    for path in (
        b"http://[::1/api/about",
        b"http://a:b/api/about",
        b"http://127.0.0.1:99999/api/about",
        b"/api/search?q=%ff%fe",
        b"/api/search?q=%ed%a0%80",
    ):
        answer = raw(port, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 "), path
        assert b"malformed address" in answer, path
    for origin in (
        "http://[::1",
        "http://[",
        "http://127.0.0.1:port",
        f"http://127.0.0.1:{port}/path",
        f"http://me@127.0.0.1:{port}",
        f"127.0.0.1:{port}",
        "http://",
        "://",
        " ",
        "\x7f",
        f"http://127.0.0.1:{port} http://evil.example",
    ):
        status, _, body = ask(site, "/api/search", png_bytes(1), {"Origin": origin})
        assert (status, json.loads(body)["error"]) == (400, "malformed Origin"), origin


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /api/about HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 200),
        (b"HEAD /api/about HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"PUT / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 403),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET / HTTP/1.x\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 505),
        (b"nonsense\r\n\r\n", 400),
        (b"one two three four\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a\r\n\r\n", 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 150 + b"\r\n", 431),
    ],
)
def test_every_answer_has_the_same_headers(site: Site, request_: bytes, status: int) -> None:
    found = raw(site.server.server_port, request_)
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), found[:200]
    lines = dict(line.split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:])
    for name, value in site.server.page_headers.items():
        assert lines[name] == value, name
    if not request_.startswith(b"HEAD"):
        assert len(body) == int(lines["Content-Length"])
        assert lines["Content-Type"].endswith("charset=utf-8")


def test_connections_are_counted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    about = b"GET /api/about HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with served(site) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port)))
            idle.sendall(b"GET /api/about HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert idle.recv(100).startswith(b"HTTP/1.1 200")
        answer = raw(server.server_port, about)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"nosniff" in answer
        assert answer.endswith(b'{"error": "too many connections; try again"}')
        idle.close()
        deadline = time.monotonic() + 20
        while not raw(server.server_port, about).startswith(b"HTTP/1.1 200"):
            assert time.monotonic() < deadline, "a connection that ended still counts"
            time.sleep(0.05)


def test_one_address_gets_a_share_of_an_open_server(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS_OF_ONE", 1)
    with served(site) as server:
        server.is_local = False  # as with --host
        with socket.create_connection(("127.0.0.1", server.server_port)) as idle:
            idle.sendall(b"GET /api/about HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert idle.recv(100).startswith(b"HTTP/1.1 200")
            assert raw(server.server_port, b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /api/about HTTP/1.1\r\nX: ",
        b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
        b"",
    ],
    ids=["in the headers", "in the body", "in the first line"],
)
def test_a_client_that_trickles_is_let_go(site: Site, monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    """A client that sends an occasional byte is never silent, but its request still ends."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 1.0)
    with served(site) as server, socket.create_connection(("127.0.0.1", server.server_port)) as slow:
        slow.sendall(head)
        started = time.monotonic()
        while time.monotonic() - started < 30:
            try:
                slow.sendall(b"a")
            except OSError:  # a reset or a broken pipe, as it comes
                break
            time.sleep(0.1)
        assert time.monotonic() - started < 20
        assert ask(site, "/api/about")[0] == 200


def test_a_slow_upload_that_keeps_coming_is_taken(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline grows with received bytes, so that a large image over a slow line is not cut off."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(connections, "LEAST_BYTES_PER_SECOND", 20)
    image = png_bytes(3)
    head = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    with served(site) as server, socket.create_connection(("127.0.0.1", server.server_port)) as slow:
        slow.sendall(head % len(image))
        step = len(image) // 20 + 1
        for start in range(0, len(image), step):
            slow.sendall(image[start : start + step])
            time.sleep(0.1)
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
