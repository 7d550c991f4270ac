"""Whatever a server does, a request ends when its time is over, with a reason."""

import contextlib
import gzip
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data_prep.download.web import deadline
from data_prep.download.web.deadline import Deadline, look_up
from data_prep.download.web.public_web import open_public

TIMEOUT_SECONDS, MOST_SECONDS = 1.0, 4.0  # a busy machine is late
Server = Callable[[socket.socket], None]

OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def _sends(data: bytes) -> Server:
    return lambda connection: connection.sendall(data)


def _drips(first: bytes, then: bytes, seconds: float) -> Server:
    def answer(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(then)
            time.sleep(seconds)

    return answer


def _late(data: bytes) -> Server:
    def answer(connection: socket.socket) -> None:
        time.sleep(1.5 * TIMEOUT_SECONDS)
        connection.sendall(data)

    return answer


def _redirects_slowly(connection: socket.socket) -> None:
    port = connection.getsockname()[1]
    time.sleep(0.4 * TIMEOUT_SECONDS)
    connection.sendall(
        b"HTTP/1.1 302 F\r\nContent-Length: 0\r\nLocation: http://127.0.0.1:%d/next\r\n\r\n" % port
    )


def _resets(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


SLOW: dict[str, Server] = {
    "silent": _drips(b"", b"", 0.1),
    "slow status line": _drips(b"HTTP/1.1 200 ", b"O", 0.2),
    "slow header": _drips(b"HTTP/1.1 200 OK\r\nX: ", b"a", 0.2),
    "endless headers": _drips(b"HTTP/1.1 200 OK\r\n", b"X: a\r\n", 0.1),
    "endless 100": _drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02),
    "endless 103": _drips(b"", b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n", 0.02),
    "slow interim header": _drips(b"HTTP/1.1 103 E\r\nX: ", b"a", 0.2),
    "slow chunk size": _drips(CHUNKED + b"3;", b"x", 0.2),
    "slow chunk": _drips(CHUNKED + b"ffff\r\n", b"x", 0.2),
    "slow trailers": _drips(CHUNKED + b"1\r\na\r\n0\r\n", b"X: y\r\n", 0.2),
    "slow body": _drips(OK + b"Content-Length: 1000\r\n\r\n", b"x", 0.2),
    "body without length, left open": _drips(OK + b"\r\nabc", b"", 0.2),
    "kept alive, short of its length": _drips(
        OK + b"Connection: keep-alive\r\nContent-Length: 9\r\n\r\nabc", b"", 0.2
    ),
    "slow redirects": _redirects_slowly,
    "late": _late(OK + b"Content-Length: 3\r\n\r\nabc"),
}
MUCH: dict[str, Server] = {
    "endless body": _drips(OK + b"\r\n", b"a" * 65536, 0.0),
    "endless trailers": _drips(CHUNKED + b"0\r\n", b"X: yyyyyyyyyyyyyyyyyyy\r\n" * 5000, 0.0),
    "endless 100, fast": _drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 5000, 0.0),
    "endless header line": _drips(b"HTTP/1.1 200 OK\r\nX: ", b"a" * 65536, 0.0),
    "endless headers, fast": _drips(b"HTTP/1.1 200 OK\r\n", b"X: a\r\n" * 5000, 0.0),
    "endless interim headers": _drips(b"HTTP/1.1 103 E\r\n", b"X: a\r\n" * 5000, 0.0),
    "endless chunk size": _drips(CHUNKED, b"0" * 65536, 0.0),
    "reset": _resets,
    "closed": _sends(b""),
    "no HTTP": _sends(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "chunk of 5000 digits": _sends(CHUNKED + b"f" * 5000 + b"\r\nabc"),
    "negative chunk": _sends(CHUNKED + b"-5\r\nabc\r\n0\r\n\r\n"),
}
FINE: dict[str, Server] = {
    "length of 5000 digits": _sends(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nabc"),
    "negative length": _sends(OK + b"Content-Length: -3\r\n\r\nabc"),
    "two lengths": _sends(OK + b"Content-Length: 3\r\nContent-Length: 30\r\n\r\nabc"),
    "early hints": _sends(
        b"HTTP/1.1 103 E\r\nLink: a\r\n\r\nHTTP/1.1 102 P\r\n\r\n" + OK + b"Content-Length: 3\r\n\r\nabc"
    ),
    "kept alive": _drips(OK + b"Connection: keep-alive\r\nContent-Length: 3\r\n\r\nabc", b"", 0.2),
    "chunks, kept alive": _drips(CHUNKED + b"3\r\nabc\r\n0\r\n\r\n", b"", 0.2),
}  # fmt: skip


@contextlib.contextmanager
def served(answer: Server, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A server on loopback, one thread a connection; gives its port."""
    ended = threading.Event()

    def one(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            connection.recv(65536)
            answer(connection)

    def loop(listener: socket.socket) -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        threading.Thread(target=loop, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        ended.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def _ask(address: str) -> tuple[object, float]:
    """What a request gives, its bytes or its exception, and the seconds it took."""
    start = time.monotonic()
    found: object
    try:
        with open_public(address, {}, TIMEOUT_SECONDS, ["127.0.0.0/8"]) as response:
            body = b""
            while chunk := response.read1(65536):
                body += chunk
            found = body
    except Exception as error:
        found = error
    return found, time.monotonic() - start


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[object, float]]:
    """All servers asked at once."""
    servers = SLOW | MUCH | FINE
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(servers)) as pool:
        ports = {name: stack.enter_context(served(answer)) for name, answer in servers.items()}
        asked = {name: pool.submit(_ask, f"http://127.0.0.1:{port}/x.png") for name, port in ports.items()}
        return {name: future.result() for name, future in asked.items()}


@pytest.mark.parametrize("name", [*SLOW, *MUCH, *FINE])
def test_every_request_ends_in_time(answers: dict[str, tuple[object, float]], name: str) -> None:
    found, seconds = answers[name]
    assert seconds < MOST_SECONDS
    if name in SLOW:
        assert isinstance(found, TimeoutError), found
        assert seconds > 0.9 * TIMEOUT_SECONDS
    elif name in MUCH:
        assert isinstance(found, Exception) or found == b"", found
    else:
        assert found == b"abc"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
        " -addext subjectAltName=DNS:localhost"
    )
    made = subprocess.run(
        [*command.split(), "-keyout", str(path), "-out", f"{path}.crt"], capture_output=True, check=False
    )
    assert made.returncode == 0, made.stderr
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


@pytest.mark.slow
def test_tls_has_the_same_deadline(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate))
    trusting.sslsocket_class = deadline._SSLSocket
    monkeypatch.setattr(deadline, "_tls", lambda: trusting)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with served(FINE["kept alive"], context) as port:
        assert _ask(f"https://localhost:{port}/")[0] == b"abc"
        found, _ = _ask(f"https://127.0.0.1:{port}/")  # the certificate is not of that name
        assert isinstance(found, ssl.SSLCertVerificationError)
    for name in ("slow header", "slow body", "slow chunk size", "slow trailers"):
        with served(SLOW[name], context) as port:
            found, seconds = _ask(f"https://localhost:{port}/")
            assert isinstance(found, TimeoutError), (name, found)
            assert seconds < MOST_SECONDS
    for handshake in (SLOW["silent"], _drips(b"", b"\x16\x03\x03\x40\x00", 0.2)):
        with served(handshake) as port:
            found, seconds = _ask(f"https://localhost:{port}/")
            assert isinstance(found, TimeoutError | ssl.SSLError), found
            assert seconds < MOST_SECONDS


def test_a_resolver_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    hung = threading.Event()
    numeric = socket.getaddrinfo

    def look(host: str, *arguments: Any, **options: Any) -> Any:
        if host == "quick.example":
            return numeric("127.0.0.1", 80)
        if host == "slow.example" and not options.get("flags"):
            hung.wait()
        return numeric(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look)
    own = deadline._Lookups()
    monkeypatch.setattr(deadline, "_lookups", lambda: own)
    before = threading.active_count()
    with ThreadPoolExecutor(100) as pool:
        start = time.monotonic()
        asked = [pool.submit(_ask, "http://slow.example/") for _ in range(100)]
        found = [future.result()[0] for future in asked]
        assert time.monotonic() - start < MOST_SECONDS
    assert all(isinstance(item, TimeoutError) for item in found), found[0]
    assert "looking up slow.example" in str(found[0])
    assert threading.active_count() - before <= deadline._MAX_LOOKUPS
    hung.set()
    assert look_up("quick.example", 80, Deadline(5, 0))[0][4][0] == "127.0.0.1"


def test_each_address_of_a_name_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is given up in time for the second; a hundred that do not answer cost no more than one."""
    numeric = socket.getaddrinfo
    tried: list[object] = []

    def connect(self: socket.socket, place: Any) -> None:
        tried.append(place[0])
        if place[0] != "127.0.0.1":  # nothing answers at the others
            time.sleep(self.gettimeout() or 0)
            raise TimeoutError("timed out")
        socket.socket.connect(self, place)

    monkeypatch.setattr(deadline._Socket, "connect", connect)

    def places(*hosts: str) -> Callable[..., Any]:
        return lambda host, port, **options: [
            found
            for each in (hosts if host == "many.example" else [host])
            for found in numeric(each, port, **options)
        ]

    with served(FINE["two lengths"]) as port:
        monkeypatch.setattr(socket, "getaddrinfo", places("127.0.0.2", "127.0.0.3", "127.0.0.1"))
        found, seconds = _ask(f"http://many.example:{port}/")
        assert found == b"abc", found
        assert tried == ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
        monkeypatch.setattr(socket, "getaddrinfo", places(*(f"127.0.1.{number}" for number in range(1, 101))))
        found, seconds = _ask(f"http://many.example:{port}/")
        assert isinstance(found, TimeoutError)
        assert seconds < MOST_SECONDS


def test_a_hung_look_up_does_not_keep_the_process() -> None:
    code = (
        "import socket, threading; from data_prep.download.web import deadline\n"
        "socket.getaddrinfo = lambda host, *a, flags=0, **k: (_ for _ in ()).throw(socket.gaierror) if flags"
        " else threading.Event().wait()\n"
        "try: deadline.look_up('slow.example', 80, deadline.Deadline(0.1, 0))\n"
        "except TimeoutError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "looking up slow.example\n"), done.stderr


def test_what_is_compressed_is_not_blown_up() -> None:
    packed = gzip.compress(bytes(50 << 20))
    with served(
        _sends(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed)
    ) as port:
        found, _ = _ask(f"http://127.0.0.1:{port}/")
    assert found == packed


def test_no_socket_is_left_open() -> None:
    names = [*MUCH, "late", "two lengths"]
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(served((SLOW | MUCH | FINE)[name])) for name in names]
        before = len(os.listdir("/proc/self/fd"))
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(lambda port: _ask(f"http://127.0.0.1:{port}/"), ports * 2))
        time.sleep(2 * TIMEOUT_SECONDS)  # the servers hang up
        assert len(os.listdir("/proc/self/fd")) <= before + 4
