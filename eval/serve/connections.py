"""Limits the connections, time and bytes that clients can use up."""

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

MAX_CONNECTIONS = 32  # each has a thread and at most one upload in memory; further ones are refused
MAX_CONNECTIONS_OF_ONE = 16  # from one address, unless only this machine can reach the server
SILENT_SECONDS = 30.0  # the server disconnects clients that stay silent for this long
REQUEST_SECONDS = 60.0  # from a request's first byte to its last; bytes at the minimum rate extend it
LEAST_BYTES_PER_SECOND = 32 << 10
DRAIN_SECONDS = 5.0  # for bytes that a refused client still sends


class RequestReader(io.RawIOBase):
    """Reads a connection with one deadline per request; a socket's timeout restarts with every byte."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._ends: float | None = None
        self._bonus = 1 / LEAST_BYTES_PER_SECOND  # seconds that a byte earns

    def next_request(self) -> None:
        """Wait for another request; its first byte starts the deadline."""
        self._ends, self._bonus = None, 1 / LEAST_BYTES_PER_SECOND

    def end_soon(self) -> None:
        """Allow only DRAIN_SECONDS more, however many bytes arrive."""
        self._ends, self._bonus = time.monotonic() + DRAIN_SECONDS, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive available bytes.

        Raises:
            TimeoutError: if the client is silent or too slow.
        """
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
    """Serves each connection in a thread up to a limit; further connections get an error and are closed."""

    daemon_threads = False  # a thread inside torch or FAISS while Python shuts down causes an abort
    is_local = True  # only this machine can reach it
    page_headers: Mapping[str, str]  # of every answer

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self._clients = dict[Any, str]()  # connection → address
        self._counting = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse it."""
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
        """Record the end of a connection."""
        with self._counting:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Close open connections, such as a browser's idle ones, and wait for their threads."""
        with self._counting:
            clients = list(self._clients)
        for connection in clients:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def _turn_away(self, request: Any) -> None:
        """Answer without waiting for the request, because this thread accepts connections."""
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
