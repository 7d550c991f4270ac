"""One deadline for a whole request: the look-up, the connection, TLS, and every byte in both directions.

A socket's timeout restarts with each byte, so a server that sends one byte a second would never time out.
Here each call on a socket gets the time that the whole request has left, and a request also ends when it has
received more bytes than any answer may have.
"""

import contextlib
import errno
import functools
import queue
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any

# Concurrent look-ups in a process: getaddrinfo takes no time limit, and a resolver that never answers must
# not leave a thread behind for every row.
_MAX_LOOKUPS = 64

Places = Sequence[tuple[Any, ...]]  # as getaddrinfo gives them


class TooManyBytesError(Exception):
    """A server sent more bytes than an answer may have."""


class Deadline:
    """The budget of one request: `seconds` from now, and the bytes that it may still receive."""

    def __init__(self, seconds: float, max_bytes: int) -> None:
        self._until = time.monotonic() + seconds
        self._bytes_left = max_bytes

    def left(self) -> float:
        """Return the remaining seconds.

        Raises:
            TimeoutError: if no time is left.
        """
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the time for the whole request is over")
        return seconds

    def take_in(self, num_bytes: int) -> int:
        """Count received bytes; raise TooManyBytesError if there are too many."""
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise TooManyBytesError("more bytes than an answer may have")
        return num_bytes


class AtOnce(Deadline):
    """Lets a socket give only what has come already."""

    def __init__(self) -> None:
        super().__init__(0.0, 0)

    def left(self) -> float:
        return 0.0

    def take_in(self, num_bytes: int) -> int:
        return num_bytes


class _Socket(socket.socket):
    deadline: Deadline

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(self.deadline.left())
        return self.deadline.take_in(super().recv_into(*arguments))

    def sendall(self, *arguments: Any) -> None:
        self.settimeout(self.deadline.left())
        super().sendall(*arguments)


class _SSLSocket(ssl.SSLSocket):
    deadline: Deadline

    def recv_into(self, *arguments: Any) -> int:
        # OpenSSL reads whole records; CPython gives it the timeout for all of one call.
        self.settimeout(self.deadline.left())
        try:
            return self.deadline.take_in(super().recv_into(*arguments))
        except ssl.SSLWantReadError:  # only with `AtOnce`
            raise BlockingIOError(errno.EAGAIN, "nothing has come") from None

    def send(self, *arguments: Any) -> int:
        self.settimeout(self.deadline.left())
        return super().send(*arguments)


def connect(places: Places, deadline: Deadline) -> socket.socket:
    """Connect to the first place that answers; each gets an equal share of the remaining time.

    Raises:
        OSError: the error of the last place, if none answers.
    """
    last: OSError = OSError("no address")
    for number, (family, kind, protocol, _, place) in enumerate(places):
        sock = _Socket(family, kind, protocol)
        try:
            sock.settimeout(deadline.left() / (len(places) - number))
            sock.connect(place)
        except OSError as error:
            sock.close()
            last = error
            continue
        except BaseException:
            sock.close()
            raise
        sock.deadline = deadline
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    raise last


def secure(sock: socket.socket, host: str, deadline: Deadline) -> socket.socket:
    """Wrap a connected socket in TLS; the handshake gets the remaining time."""
    wrapped = _tls().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    wrapped.deadline = deadline  # type: ignore[attr-defined]
    try:
        wrapped.settimeout(deadline.left())
        wrapped.do_handshake()
    except BaseException:
        wrapped.close()
        raise
    return wrapped


@functools.cache
def _tls() -> ssl.SSLContext:
    """Return one context for all requests, because reading the certificates takes longer than a request."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    context.sslsocket_class = _SSLSocket
    return context


class _Lookups:
    """Threads that look up names, started when needed, at most _MAX_LOOKUPS."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[str, int, queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_threads = self._num_busy = 0

    def ask(self, host: str, port: int, deadline: Deadline) -> Places:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self._lock:
            self._num_busy += 1
            if self._num_threads < min(self._num_busy, _MAX_LOOKUPS):
                # Daemons: one that hangs in the resolver must not keep the process from ending.
                threading.Thread(target=self._work, daemon=True).start()
                self._num_threads += 1
        self._waiting.put((host, port, answer))
        try:
            found = answer.get(timeout=deadline.left())
        except queue.Empty:
            raise TimeoutError(f"looking up {host}") from None
        if isinstance(found, BaseException):
            raise found
        places: Places = found
        return places

    def _work(self) -> None:
        while True:
            host, port, answer = self._waiting.get()
            try:
                answer.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except Exception as error:
                answer.put(error)
            with self._lock:
                self._num_busy -= 1


@functools.cache
def _lookups() -> _Lookups:
    return _Lookups()


def look_up(host: str, port: int, deadline: Deadline) -> Places:
    """Return the places (as getaddrinfo gives them) of a host.

    Raises:
        TimeoutError: if the resolver does not answer in the remaining time.
        socket.gaierror: if the name has no address.
    """
    with contextlib.suppress(socket.gaierror):  # numeric addresses in any notation need no resolver
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return _lookups().ask(host, port, deadline)
