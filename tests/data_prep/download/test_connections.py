"""Which connections are used for a further request, and that none of them gives another request's answer."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.download.web import connections, deadline, public_web
from data_prep.download.web.address import AddressRefusedError
from data_prep.download.web.body import CutOffError, read_body
from data_prep.download.web.connections import Connections
from data_prep.download.web.public_web import HttpStatusError, open_public
from tests.data_prep.download.test_deadline import certificate as certificate

OK = b"HTTP/1.1 200 OK\r\n"
ABC = b"Content-Length: 3\r\n\r\nabc"
MISSING = b"HTTP/1.1 404 No\r\n"
# Path → what the server sends.
ANSWERS = {
    "length": OK + ABC,
    "chunked": OK + b"Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX: y\r\n\r\n",
    "hint": b"HTTP/1.1 103 E\r\nLink: a\r\n\r\n" + OK + ABC,
    "missing": MISSING + b"Content-Length: 5\r\n\r\nno no",
    "missing, chunked": MISSING + b"Transfer-Encoding: chunked\r\n\r\n5\r\nno no\r\n0\r\n\r\n",
    "missing, large": MISSING + b"Content-Length: 99999\r\n\r\n" + bytes(99999),
    "missing, slow": MISSING + b"Content-Length: 5\r\n\r\nno",
    "close": OK + b"Connection: close\r\n" + ABC,
    "1.0": b"HTTP/1.0 200 OK\r\n" + ABC,
    "switching": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
    "two lengths": OK + b"Content-Length: 3\r\n" + ABC,
    "more": OK + ABC + b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nxyz",
    "more, later": OK + ABC,
    "cut": OK + b"Content-Length: 9\r\n\r\nabc",
}
KEPT = ["length", "chunked", "hint", "missing", "missing, chunked"]


class _Server:
    """Answers requests on each connection, and knows which request came on which."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.base = f"http://127.0.0.1:{port}" if context is None else f"https://localhost:{port}"
        self.asked: list[tuple[int, str]] = []  # connection, path
        self.hangs_up_after = 1 << 30  # requests
        self.drops = False  # a request after the first of a connection
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self) -> None:
        with contextlib.suppress(OSError):
            for number in range(1 << 30):
                sock = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(number, sock), daemon=True).start()

    def _serve(self, number: int, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True)
            for count in range(self.hangs_up_after):
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    if not (data := sock.recv(65536)):
                        return
                    request += data
                path = request.split(b" ")[1].decode()[1:].replace("_", " ")
                self.asked.append((number, path))
                if self.drops and count:
                    return
                if path == "late":
                    time.sleep(1)
                    return
                sock.sendall(ANSWERS[path])
                if path == "more, later":
                    time.sleep(0.1)
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nxyz")
                if path == "cut":
                    return

    def get(self, path: str, allowed: str = "127.0.0.0/8", timeout: float = 3.0) -> bytes:
        with open_public(f"{self.base}/{path.replace(' ', '_')}", {}, timeout, [allowed]) as response:
            return read_body(response, 1000).getvalue()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    own = Connections()
    monkeypatch.setattr(public_web, "connections", lambda: own)
    running = _Server()
    yield running
    running.close()


@pytest.mark.parametrize("path", ANSWERS)
def test_a_connection_is_used_again_if_its_answer_is_over(server: _Server, path: str) -> None:
    with contextlib.suppress(HttpStatusError, CutOffError):
        assert server.get(path) == b"abc"
    if path == "more, later":
        time.sleep(0.3)
    assert server.get("length") == b"abc"
    assert server.asked == [(0, path), (0 if path in KEPT else 1, "length")]


def test_connections_of_tls_are_used_again_too(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Connections()
    monkeypatch.setattr(public_web, "connections", lambda: own)
    trusting = ssl.create_default_context(cafile=str(certificate))
    trusting.sslsocket_class = deadline._SSLSocket
    monkeypatch.setattr(deadline, "_tls", lambda: trusting)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = _Server(context)
    for path in ("length", "chunked", "more", "length", "length"):
        assert server.get(path) == b"abc"
    assert [number for number, _ in server.asked] == [0, 0, 0, 1, 1]
    server.close()


def test_an_answer_that_nobody_read_is_not_followed(server: _Server) -> None:
    with (
        pytest.raises(ValueError, match="mine"),
        open_public(f"{server.base}/length", {}, 3, ["127.0.0.0/8"]),
    ):
        raise ValueError("mine")
    assert server.get("length") == b"abc"
    assert [number for number, _ in server.asked] == [0, 1]


def test_a_server_that_hangs_up_meanwhile_is_asked_on_a_new_connection(server: _Server) -> None:
    server.hangs_up_after = 1
    assert server.get("length") == b"abc"
    time.sleep(0.1)
    assert server.get("length") == b"abc"
    assert [number for number, _ in server.asked] == [0, 1]


def test_a_request_that_a_closing_server_drops_is_sent_again(server: _Server) -> None:
    server.drops = True
    assert server.get("length") == b"abc"
    assert server.get("length") == b"abc"
    assert [number for number, _ in server.asked] == [0, 0, 1]


def test_the_address_is_judged_for_each_request(server: _Server) -> None:
    assert server.get("length") == b"abc"
    with pytest.raises(AddressRefusedError, match=r"127\.0\.0\.1, which is not a public address"):
        server.get("length", allowed="10.0.0.0/8")
    assert len(server.asked) == 1


def test_each_request_has_a_deadline_of_its_own(server: _Server) -> None:
    assert server.get("length", timeout=0.5) == b"abc"
    time.sleep(0.6)
    assert server.get("length", timeout=0.5) == b"abc"
    with pytest.raises(TimeoutError):
        server.get("late", timeout=0.3)
    assert [number for number, _ in server.asked] == [0, 0, 0]


def test_few_connections_are_kept_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])
    pairs = [socket.socketpair() for _ in range(4)]
    kept = Connections(most=2, seconds=5.0)
    for number, (sock, _) in enumerate(pairs[:3]):
        kept.keep(("http", f"{number}.cn", 80), sock)
    assert pairs[0][0].fileno() == -1  # closed: the oldest
    assert kept.take(("http", "0.cn", 80)) is None
    assert kept.take(("https", "1.cn", 80)) is None
    assert kept.take(("http", "1.cn", 80)) is pairs[1][0]
    assert kept.take(("http", "1.cn", 80)) is None
    now[0] += 6
    kept.keep(("http", "3.cn", 80), pairs[3][0])
    assert pairs[2][0].fileno() == -1  # for too long
    pairs[3][1].close()
    assert kept.take(("http", "3.cn", 80)) is None
    assert pairs[3][0].fileno() == -1
    for pair in pairs:
        for sock in pair:
            sock.close()
