"""What strangers may take of a server: connections, time and bytes are bounded."""

import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any

MAX_CONNECTIONS = 32  # at once, each with a thread and at most one upload in memory; more are turned away
MAX_CONNECTIONS_OF_ONE = 16  # from one address, unless only this machine can reach the server
SILENT_SECONDS = 30.0  # a client that says nothing for so long is let go
REQUEST_SECONDS = 60.0  # from a request's first byte to its last, and more for what comes at the least rate
LEAST_BYTES_PER_SECOND = 32 << 10
DRAIN_SECONDS = 5.0  # for what a refused client still sends


class RequestReader(io.RawIOBase):
    """Reads a connection with one deadline a request: a socket's timeout counts anew for every byte."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._ends: float | None = None
        self._bonus = 1 / LEAST_BYTES_PER_SECOND  # seconds that a byte earns

    def next_request(self) -> None:
        """Wait for another request, whose first byte starts its deadline."""
        self._ends, self._bonus = None, 1 / LEAST_BYTES_PER_SECOND

    def end_soon(self) -> None:
        """Allow only a little longer, however much comes."""
        self._ends, self._bonus = time.monotonic() + DRAIN_SECONDS, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive what has come. Raises TimeoutError for a client that is silent or too slow."""
        left = SILENT_SECONDS if self._ends is None else self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request takes too long")
        self._connection.settimeout(min(SILENT_SECONDS, left))
        num_bytes = self._connection.recv_into(buffer)
        if self._ends is None:
            self._ends = time.monotonic() + REQUEST_SECONDS
        self._ends += num_bytes * self._bonus
        return num_bytes


class BoundedServer(ThreadingHTTPServer):
    """A thread for each connection, up to a number of them; those beyond it are told so and closed."""

    daemon_threads = False  # one that is inside torch or FAISS while Python shuts down ends in an abort
    is_local = True  # only this machine can reach it
    page_headers: Mapping[str, str]  # of every answer

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self._clients = dict[Any, str]()  # connection → address
        self._counting = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or turn it away."""
        address = str(client_address[0])
        with self._counting:
            of_one = sum(1 for other in self._clients.values() if other == address)
            is_full = len(self._clients) >= MAX_CONNECTIONS
            is_full |= not self.is_local and of_one >= MAX_CONNECTIONS_OF_ONE
            if not is_full:
                self._clients[request] = address
        if is_full:
            self._turn_away(request)
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Note a connection's end."""
        with self._counting:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """End what is still open, such as a browser's idle connections, and wait for its threads."""
        with self._counting:
            clients = list(self._clients)
        for connection in clients:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def _turn_away(self, request: Any) -> None:
        """Answer without waiting for the request: this is the thread that accepts connections."""
        body = json.dumps({"error": "too many connections; try again"}).encode()
        status = HTTPStatus.SERVICE_UNAVAILABLE
        headers = {
            "Server": "cnclip",
            "Date": formatdate(usegmt=True),
            **self.page_headers,
            "Content-Type": "application/json; charset=utf-8",
            "Content-Length": str(len(body)),
            "Retry-After": "1",
            "Connection": "close",
        }
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", *map(": ".join, headers.items()), "", ""]
        request.setblocking(False)
        with contextlib.suppress(OSError):
            request.send("\r\n".join(lines).encode("latin-1") + body)
        with contextlib.suppress(OSError):  # unread bytes would turn the answer into a reset
            request.recv(1 << 16)
