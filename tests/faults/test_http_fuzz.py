"""Answers that no web server should give, by chance: each request ends in time, with bytes or a known reason.

Seeded. Honest answers of every kind that HTTP/1.1 knows are damaged (`tests.helpers.mutations`), put together
from parts that do not belong together, sent in pieces with pauses, and cut.
"""

import contextlib
import gzip
import random
import re
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_prep.download.fetch import fetch_image
from data_prep.download.web.public_web import ALLOWED_VARIABLE
from pipeline.core.shard_format import MAX_IMAGE_BYTES
from tests.helpers.mutations import mutate

TIMEOUT_SECONDS, MOST_SECONDS, MOST_GROWTH_BYTES = 0.5, 10.0, 2 << 30
REASONS = {
    "http_404", "http_error", "timeout", "connection", "opted_out", "body_limit", "address_refused", "dns",
    "tls", "too_many_redirects", "content_encoding", "bad_answer",
}  # fmt: skip
BODY = bytes(range(256)) * 4
GZIPPED = gzip.compress(bytes(1 << 20), mtime=0)
STATUSES = (
    b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 206 Partial", b"HTTP/1.1 204 No Content",
    b"HTTP/1.1 404 No", b"HTTP/1.1 503 Later", b"HTTP/1.1 301 Moved", b"HTTP/1.1 302 Found",
    b"HTTP/1.1 101 Switching", b"HTTP/2 200", b"HTTP/1.1 99999 Much", b"HTTP/1.1 -1 Less", b"HTTP/1.1 2xx OK",
    b"ICY 200 OK", b"HTTP/1.1  200", b"HTTP/1.1", b"", b"\xff\xfe", b"HTTP/1.1 200 \x1b[31m",
)  # fmt: skip
HEADERS = (
    b"Content-Length: 1024", b"Content-Length: 0", b"Content-Length: -1", b"Content-Length: +1024",
    b"Content-Length: 1e3", b"Content-Length: 99999999999999999999", b"Content-Length: " + b"1" * 6000,
    b"content-length:1024,1024", "Content-Length: ¹".encode(), b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity", b"Connection: keep-alive",
    b"Content-Encoding: gzip", b"Content-Type: image/jpeg; charset=\xff", b"X-Robots-Tag: noai",
    b"X-Robots-Tag: bot: : noai,,", b"Location: /next", b"Location: file:///etc/passwd", b"Location: //[::1",
    b"Location: http://169.254.169.254/", b"Location: http://\xe5\x9b\xbe.invalid:0/", b"Location: \x00",
    b"Location: http://127.0.0.1:99999/", b"Location: http://a..b/", b"Location: data:,x", b"Location: ?",
    b"Location: http://user:p@127.0.0.1/", b"Set-Cookie: a", b" folded", b": no name", b"no colon",
    b"X:" + b"y" * 9000,
)  # fmt: skip
CHUNK_SIZES = (
    b"400",
    b"0",
    b"-1",
    b"0x10",
    b"fffffffffffffffff",
    b"400;a=b",
    b"",
    b" 400",
    b"g",
    b"4_0",
    b"1" * 5000,
)


def _answer(rng: random.Random) -> bytes:
    """One answer, as yet whole."""
    lines = []
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        lines += [
            rng.choice((b"HTTP/1.1 100 Continue", b"HTTP/1.1 103 Early Hints", b"HTTP/1.1 199 X")),
            b"Link: a",
            b"",
        ]
    chosen = [HEADERS[0]] if rng.random() < 0.3 else rng.sample(HEADERS, rng.randint(0, 6))
    lines += [rng.choice(STATUSES[:8]) if rng.random() < 0.8 else rng.choice(STATUSES), *chosen]
    if rng.random() < 0.02:
        lines += [b"X-%d: a" % number for number in range(300)]
    head = rng.choice((b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r")).join([*lines, b"", b""])
    if any(b"chunked" in line for line in chosen):
        chunks = b"".join(
            (rng.choice(CHUNK_SIZES) if rng.random() < 0.3 else b"400") + b"\r\n" + BODY + b"\r\n"
            for _ in range(rng.randint(0, 3))
        )
        return head + chunks + b"0\r\n" + b"X-Trailer: a\r\n" * rng.randint(0, 3) + b"\r\n"
    return head + (GZIPPED if b"Content-Encoding: gzip" in chosen else BODY)


class _Site:
    """Answers each path's number with the answer of that seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._one, args=(self._listener.accept()[0],), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            asked = re.match(rb"GET /(\d+)", connection.recv(65536))
            rng = random.Random(f"{self.seed} {int(asked[1]) if asked else 0}")
            data = _answer(rng)
            if rng.random() < 0.6:
                data = mutate(data, rng)
            how = rng.random()
            if how < 0.05:  # a byte at a time
                for number in range(0, min(len(data), 400), 7):
                    connection.sendall(data[number : number + 7])
                    time.sleep(0.02)
            elif how < 0.08:  # again and again
                until = time.monotonic() + 2 * TIMEOUT_SECONDS
                while time.monotonic() < until:
                    connection.sendall(data[-64:])
                    time.sleep(0.02)
            elif how < 0.12:
                connection.sendall(data[: len(data) // 2])
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            elif how < 0.16:  # left open
                connection.sendall(data)
                time.sleep(2 * TIMEOUT_SECONDS)
            else:
                connection.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Site]:
    monkeypatch.setenv(ALLOWED_VARIABLE, "127.0.0.0/8")
    running = _Site(request.param)
    yield running
    running.close()


def _ask(site: _Site, number: int) -> str:
    """The reason of one request, or `bytes`; asserts what holds for each."""
    start = time.monotonic()
    key, body, error = fetch_image(
        number, f"http://127.0.0.1:{site.port}/{number}", TIMEOUT_SECONDS, "cnclip", ["noai", "noindex"]
    )
    assert time.monotonic() - start < MOST_SECONDS, (site.seed, number)
    assert key == number
    if error is None:
        assert body is not None
        assert body.tell() <= MAX_IMAGE_BYTES
        return "bytes"
    assert body is None
    reason = error.split(":")[0]
    assert reason in REASONS, (site.seed, number, error)
    return reason


def _fuzz(site: _Site, count: int) -> Counter[str]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(32) as pool:
        found = Counter(pool.map(lambda number: _ask(site, number), range(count)))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MOST_GROWTH_BYTES
    return found


@pytest.mark.parametrize("site", [1], indirect=True)
def test_no_answer_hangs_or_raises(site: _Site) -> None:
    found = _fuzz(site, 400)
    assert found.total() == 400
    # The fuzz reaches what it is meant to reach.
    assert {
        "bytes",
        "timeout",
        "connection",
        "http_error",
        "http_404",
        "address_refused",
        "opted_out",
    } <= found.keys()


@pytest.mark.slow
@pytest.mark.parametrize("site", [2], indirect=True)
def test_no_answer_of_many_hangs_or_raises(site: _Site) -> None:
    assert _fuzz(site, 10_000).total() == 10_000
