"""Keeps connections open for the next request to the same host.

A new connection costs a look-up, a round trip, and with https a handshake that takes more CPU time than the
rest of a request.
"""

import collections
import functools
import select
import socket
import ssl
import threading
import time
from dataclasses import dataclass

_MOST_KEPT = 512  # of a process
# Shorter than most servers wait: one that hangs up first costs a request that has to be sent again.
_KEPT_SECONDS = 4.0

Origin = tuple[str, str, int]  # scheme, host, port


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    origin: Origin
    sock: socket.socket
    since: float


class Connections:
    """Connections that nobody uses now, at most so many, each for at most a few seconds."""

    def __init__(self, most: int = _MOST_KEPT, seconds: float = _KEPT_SECONDS) -> None:
        self._most, self._seconds = most, seconds
        self._by_origin: dict[Origin, list[_Kept]] = {}
        self._by_age: collections.OrderedDict[_Kept, None] = collections.OrderedDict()
        self._lock = threading.Lock()

    def keep(self, origin: Origin, sock: socket.socket) -> None:
        """Take over a connection whose last answer was read to its end."""
        now = time.monotonic()
        kept, old = _Kept(origin, sock, now), []
        with self._lock:
            self._by_origin.setdefault(origin, []).append(kept)
            self._by_age[kept] = None
            while len(self._by_age) > self._most or next(iter(self._by_age)).since < now - self._seconds:
                old.append(next(iter(self._by_age)))
                self._forget(old[-1])
        for each in old:
            each.sock.close()

    def take(self, origin: Origin) -> socket.socket | None:
        """Return an open connection, which is then the caller's; None if there is none."""
        while True:
            with self._lock:
                if origin not in self._by_origin:
                    return None
                kept = self._by_origin[origin][-1]
                self._forget(kept)
            if kept.since >= time.monotonic() - self._seconds and _is_quiet(kept.sock):
                return kept.sock
            kept.sock.close()

    def _forget(self, kept: _Kept) -> None:
        del self._by_age[kept]
        same = self._by_origin[kept.origin]
        same.remove(kept)
        if not same:
            del self._by_origin[kept.origin]


def _is_quiet(sock: socket.socket) -> bool:
    """Whether a server has neither hung up nor sent what nobody asked for."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


@functools.cache
def connections() -> Connections:
    """Return the connections that this process keeps."""
    return Connections()
