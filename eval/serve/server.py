"""The search page: a small HTTP server over galleries and one model.

    GET  /                                the page, `serve.html`
    GET  /api/about                       model, galleries, limits
    GET  /api/search?q=TEXT               images nearest to a text
    GET  /api/search?row=N                images nearest to one of the gallery
    POST /api/search                      images nearest to the image in the body
    GET  /picture?gallery=N&row=N         a small JPEG of one row

Searches also take `gallery` (number), `k`, `min_score` (cosine) and `source` (a name), and answer with
`{"results": [{"row", "score", "captions", "source", "url"}], "note"}`; refusals with `{"error"}`.

A client can send a text, an image and numbers, never a path. The server checks an image's header before it
decodes a pixel, and re-encodes images of a gallery, so that no original bytes from the web reach the browser.
Bound to loopback, it answers only to loopback names, so that a foreign page whose name resolves to this
machine cannot read it.
"""

import io
import json
import math
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from eval.serve.access import host_name, loopback_names, page_headers
from eval.serve.connections import SILENT_SECONDS, BoundedServer, RequestReader
from eval.serve.searcher import Asked, Refusal
from eval.serve.searcher import Searcher as Searcher
from pipeline.core.arrays import Float32Array
from pipeline.core.records import ConfigError, InputError
from pipeline.core.shard_format import MAX_IMAGE_BYTES, too_large
from pipeline.core.terminal import one_line

MAX_RESULTS = 200
_DEFAULT_RESULTS = 24
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\\\s]+")
_DECODES_AT_ONCE = 4  # images of galleries; bounds the memory of concurrent requests

Answer = tuple[HTTPStatus, str, bytes]  # status, media type, body


class SearchServer(BoundedServer):
    """Serves the page until it is shut down; `port` 0 takes a free port, see `server_port`.

    Raises:
        ConfigError: if the address cannot be bound.
    """

    def __init__(self, searcher: Searcher, host: str = "127.0.0.1", port: int = 8000) -> None:
        self.searcher = searcher
        self.computing = threading.Lock()  # one search at a time, since torch uses every core
        self.decoding = threading.BoundedSemaphore(_DECODES_AT_ONCE)
        self.page = _page()
        self.page_headers = page_headers(self.page)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{host}, port {port}: {reason}; give another --host or --port (0 takes a free one)"
            ) from None
        self.names = loopback_names(host)
        self.is_local = self.names is not None

    @property
    def url(self) -> str:
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "cnclip", ""
    unread_bytes = 0

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.reader = RequestReader(self.connection)
        self.rfile = io.BufferedReader(self.reader)

    def handle_one_request(self) -> None:
        self.reader.next_request()
        super().handle_one_request()

    def parse_request(self) -> bool:
        """Read the head of a request; refuse HTTP/0.9, whose answers have no headers."""
        if not super().parse_request():
            return False
        if self.request_version == "HTTP/0.9":
            self.send_error(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
            return False
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send refusals by http.server itself in the form and with the headers of all answers."""
        self.close_connection = True
        self.unread_bytes = 0
        if self.request_version == "HTTP/0.9":  # otherwise there would be no headers
            self.request_version = "HTTP/1.0"
        status = HTTPStatus(code)
        self._send(*_json({"error": status.phrase.lower()}, status))

    def do_GET(self) -> None:
        self._answer(
            {
                "/": self._page,
                "/api/about": self._about,
                "/api/search": self._search,
                "/picture": self._image,
            }
        )

    def do_POST(self) -> None:
        self._answer({"/api/search": self._search_image})

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because searches are private."""

    def _answer(self, routes: Mapping[str, Callable[[dict[str, str]], Answer]]) -> None:
        self.unread_bytes = self._announced()
        try:
            self._check_origin()
            parts = _split(self.path, "address")
            if parts.path not in routes:
                raise Refusal(HTTPStatus.NOT_FOUND, "no such page")
            status, kind, body = routes[parts.path](_fields(parts.query))
        except Refusal as refusal:
            status, kind, body = _json({"error": str(refusal)}, refusal.status)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            return
        except InputError as error:  # names files of this machine, so only the terminal shows it
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            status, kind, body = _json(
                {"error": "the gallery is damaged; the server's terminal says where"},
                HTTPStatus.INTERNAL_SERVER_ERROR,
            )
        except Exception:
            traceback.print_exc()
            status, kind, body = _json({"error": "the search failed"}, HTTPStatus.INTERNAL_SERVER_ERROR)
        self._send(status, kind, body)

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        if self.unread_bytes:
            self.close_connection = True
        self.send_response(status)
        for name, value in self.server.page_headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        try:
            self.connection.settimeout(SILENT_SECONDS)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            self.wfile.flush()
            self._drain()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _drain(self) -> None:
        """Read what a refused client still sends, within limits: otherwise it gets a reset, not an answer."""
        left = min(self.unread_bytes, 2 * MAX_IMAGE_BYTES)
        self.reader.end_soon()
        while left > 0 and (chunk := self.rfile.read(min(left, 1 << 16))):
            left -= len(chunk)

    def _announced(self) -> int:
        """Return the number of bytes that the client announces for the body."""
        text = self.headers.get("Content-Length", "0")
        if re.fullmatch(r"[0-9]{1,15}", text) and "Transfer-Encoding" not in self.headers:
            return int(text)
        self.close_connection = True  # the end of such a request is unknown
        return 0

    def _check_origin(self) -> None:
        names = self.server.names
        if names is not None and host_name(self.headers.get("Host", "")) not in names:
            raise Refusal(HTTPStatus.FORBIDDEN, "this page answers to this machine's own name only")
        origin = self.headers.get("Origin")
        if origin is not None and _netloc(origin) != self.headers.get("Host"):
            raise Refusal(HTTPStatus.FORBIDDEN, "asked by another site")

    def _page(self, fields: dict[str, str]) -> Answer:
        return HTTPStatus.OK, "text/html; charset=utf-8", self.server.page

    def _about(self, fields: dict[str, str]) -> Answer:
        return _json(self.server.searcher.about())

    def _search(self, fields: dict[str, str]) -> Answer:
        searcher, asked = self.server.searcher, self._asked(fields)
        with self.server.computing:
            if asked.row is not None:
                return self._results(asked, searcher.row_feature(asked.gallery, asked.row), "")
            feature_D, note = searcher.text_feature(fields.get("q", ""))
            return self._results(asked, feature_D, note)

    def _search_image(self, fields: dict[str, str]) -> Answer:
        data = self._body()
        asked = self._asked({name: value for name, value in fields.items() if name != "row"})
        with self.server.computing:
            return self._results(asked, self.server.searcher.image_feature(data), "")

    def _body(self) -> bytes:
        if "Content-Length" not in self.headers or "Transfer-Encoding" in self.headers:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "send the image with its length")
        if self.unread_bytes > MAX_IMAGE_BYTES:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_large())
        if self.unread_bytes == 0:
            raise Refusal(HTTPStatus.BAD_REQUEST, "type a text or give an image")
        data = self.rfile.read(self.unread_bytes)
        if len(data) < self.unread_bytes:
            raise ConnectionError("the client left")
        self.unread_bytes = 0
        return data

    def _asked(self, fields: dict[str, str]) -> Asked:
        galleries = self.server.searcher.galleries
        number = _whole(fields, "gallery", 0, len(galleries) - 1, default=0)
        return Asked(
            gallery=number,
            k=_whole(fields, "k", 1, MAX_RESULTS, default=_DEFAULT_RESULTS),
            min_score=_score(fields),
            source=fields.get("source"),
            row=_whole(fields, "row", 0, galleries[number].num_rows - 1) if "row" in fields else None,
        )

    def _results(self, asked: Asked, feature_D: Float32Array, note: str) -> Answer:
        results, cut = self.server.searcher.results(asked, feature_D)
        return _json({"results": results, "note": "; ".join(filter(None, (note, cut)))})

    def _image(self, fields: dict[str, str]) -> Answer:
        searcher = self.server.searcher
        number = _whole(fields, "gallery", 0, len(searcher.galleries) - 1, default=0)
        row = _whole(fields, "row", 0, searcher.galleries[number].num_rows - 1)
        with self.server.decoding:
            return HTTPStatus.OK, "image/jpeg", searcher.thumbnail(number, row)


def _page() -> bytes:
    """Return the page with style and script inlined, so that it is one answer."""
    folder = Path(__file__).parent
    page, style, script = (
        (folder / f"serve.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    return page.replace("{{style}}", style).replace("{{script}}", script).encode("utf-8")


def _json(value: object, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return status, "application/json; charset=utf-8", json.dumps(value, ensure_ascii=False).encode("utf-8")


def _split(address: str, what: str) -> SplitResult:
    """Parse an address.

    Raises:
        Refusal: if it is malformed.
    """
    try:
        parts = urlsplit(address)
        if parts.port == 0:  # which itself raises ValueError if it is not a number
            raise ValueError("port 0")
    except ValueError:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"malformed {what}") from None
    return parts


def _netloc(origin: str) -> str:
    """Return host and port of an Origin, empty for `null`.

    Raises:
        Refusal: if it is not an origin.
    """
    if origin == "null":
        return ""
    if not _ORIGIN.fullmatch(origin):
        raise Refusal(HTTPStatus.BAD_REQUEST, "malformed Origin")
    return _split(origin, "Origin").netloc


def _fields(query: str) -> dict[str, str]:
    try:
        found = parse_qs(query, max_num_fields=8, errors="strict")
        return {name: values[0] for name, values in found.items()}
    except UnicodeDecodeError:
        raise Refusal(HTTPStatus.BAD_REQUEST, "malformed address: its query is not UTF-8") from None
    except ValueError:
        raise Refusal(HTTPStatus.BAD_REQUEST, "too many fields") from None


def _whole(fields: dict[str, str], name: str, low: int, high: int, default: int | None = None) -> int:
    if name not in fields and default is not None:
        return default
    text = fields.get(name, "")
    if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"{name} must be a whole number from {low} to {high}")
    return int(text)


def _score(fields: dict[str, str]) -> float:
    try:
        score = float(fields.get("min_score", "-1"))
    except ValueError:
        score = math.nan
    if not -1 <= score <= 1:
        raise Refusal(HTTPStatus.BAD_REQUEST, "min_score must be a number from -1 to 1")
    # rounding moves scores of equal vectors off 1; -1 keeps all results
    return score if score > -1 else -math.inf
