"""One GET over a connection, and its answer, which gives the connection away for the next request.

http.client reads status lines, bodies and chunks.
"""

import http
import http.client
import io
import socket
from collections.abc import Callable
from typing import Any

from data_prep.download.web.deadline import AtOnce, Deadline
from data_prep.download.web.headers import Headers, read_headers

# The rest of an answer that nobody wants is read if that spares a new connection.
_MOST_UNWANTED_BYTES = 16 << 10
_UNWANTED_SECONDS = 0.1
_BUFFER_BYTES = 64 << 10

Keep = Callable[[socket.socket], None]


class _Source:
    """What http.client wants of a socket, with a larger buffer."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def makefile(self, mode: str) -> io.IOBase:
        return self._sock.makefile("rb", _BUFFER_BYTES)


class Response(http.client.HTTPResponse):
    """The answer to a GET. Skips any interim response (102, 103 Early Hints); http.client skips only 100."""

    headers: Headers  # type: ignore[assignment]
    keep: Keep
    connection: socket.socket | None = None  # for the next request, if all goes well
    _has_more = False

    def __init__(self, sock: socket.socket) -> None:
        """Read from a socket, in pieces that most images fit into."""
        super().__init__(_Source(sock), method="GET")  # type: ignore[arg-type]

    def begin(self) -> None:
        """Read the status line and the headers, as http.client does."""
        while True:
            version, self.status, self.reason = self._read_status()  # type: ignore[attr-defined]
            if not version.startswith("HTTP/1.") and version != "HTTP/0.9":
                raise http.client.UnknownProtocol(version)
            self.headers = read_headers(self.fp)
            is_final = not 100 <= self.status < 200 or self.status == http.HTTPStatus.SWITCHING_PROTOCOLS
            if is_final:
                break
        self.version = 10 if version in ("HTTP/1.0", "HTTP/0.9") else 11
        self.chunked = (self.headers.get("transfer-encoding") or "").lower() == "chunked"
        self.chunk_left = None
        self.length = self._length()
        self.will_close = self._check_close() or (not self.chunked and self.length is None)  # type: ignore[attr-defined]

    def _length(self) -> int | None:
        if self.status in (http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED) or self.status < 200:
            return 0
        if self.chunked:
            return None
        try:
            length = int(self.headers.get("content-length") or "")
        except ValueError:
            return None
        return length if length >= 0 else None

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:  # nobody knows what is still to come
            self._discard()
        super().__exit__(kind, *rest)

    def close(self) -> None:
        """Give the connection away if all of the answer has been read, or soon can be; close it if not."""
        if self.connection is not None and not self._is_read():
            self._discard()
        super().close()
        if self.connection is not None and not self._has_more:
            sock, self.connection = self.connection, None
            self.keep(sock)
        self._discard()

    def _close_conn(self) -> None:
        if self.connection is not None:  # what came after the end would be taken for the next answer
            self.connection.deadline = AtOnce()  # type: ignore[attr-defined]
            try:
                self._has_more = bool(self.fp.peek(1))  # type: ignore[attr-defined]
            except (OSError, ValueError):
                self._has_more = True
        super()._close_conn()  # type: ignore[misc]

    def _discard(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _is_read(self) -> bool:
        """Whether the answer has been read to its end; reads it if not much is missing."""
        if self.fp is None:
            return bool(self.chunked) or self.length == 0
        if not self.chunked and self.length == 0:
            return True
        if not self.chunked and (self.length is None or self.length > _MOST_UNWANTED_BYTES):
            return False
        assert self.connection is not None
        self.connection.deadline = Deadline(_UNWANTED_SECONDS, _MOST_UNWANTED_BYTES)  # type: ignore[attr-defined]
        try:
            self.read()
        except Exception:  # http.client raises many kinds
            return False
        return True


def get(
    sock: socket.socket, host: str, target: str, headers: dict[str, str], keep: Keep | None = None
) -> Response:
    """Send one GET over a connected socket; the response owns the socket.

    If the answer is read to its end and the server keeps the connection open, `keep` gets the socket.
    `host`, `target` and `headers` are ASCII without line ends.
    """
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {headers[name]}" for name in headers)]
    if keep is None:
        lines.append("Connection: close")
    response = None
    try:
        sock.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        response = Response(sock)
        response.begin()
    except BaseException:
        if response is not None:
            response.close()
        sock.close()
        raise
    # Servers do not agree on which of two lengths counts; after 101 they speak no HTTP.
    is_clear = len(response.headers.get_all("content-length")) < 2 and response.status >= 200
    if keep is not None and is_clear and not response.will_close:
        response.connection, response.keep = sock, keep
    else:
        sock.close()  # the response keeps its own reference
    return response
