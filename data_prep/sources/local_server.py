"""A small web site on loopback: it gives the demo and emoji corpora real URLs and a real web's manners.

A site is a folder with `site.json`, which maps a URL's path to an answer, and `site/`, which holds the
files. URLs have the host `corpus.invalid` (a name reserved by RFC 2606, so it never resolves) and reach
the server because the client uses it as an HTTP proxy: they name no port, so a corpus has the same bytes
wherever and however often it is served.
"""

import dataclasses
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from data_prep.formats.base64_image import decode_base64_image
from pipeline.core import store
from pipeline.core.records import InputError
from pipeline.core.shard_format import MAX_IMAGE_BASE64_BYTES, MAX_IMAGE_BYTES

HOST = "corpus.invalid"
SITE_VARIABLE = "CNCLIP_SITE"  # environment variable: host:port of the server, for those who download


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the site does when one path is asked for."""

    file: str | None = None  # the body, relative to site/; none: an empty body
    content_type: str = "image/jpeg"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)  # besides Content-Type and Content-Length
    hang: bool = False  # accept the request and never answer
    sent_share: float = 1.0  # of the promised body, before the connection closes; 0 closes without a word


def write_site(folder: Path, answers: Mapping[str, Answer]) -> None:
    """Write `site.json`: URL paths such as `/a/00012.jpg`, and what differs there from a plain 200."""
    plain = Answer()
    rows = {
        path: {
            name: value
            for name, value in dataclasses.asdict(answer).items()
            if value != getattr(plain, name) or name == "content_type"
        }
        for path, answer in sorted(answers.items())
    }
    (folder / "site.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")


def read_site(folder: Path) -> dict[str, Answer]:
    """Read `site.json`. InputError where it is missing, malformed, or names a file outside `site/`."""
    path = folder / "site.json"
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a site is served from the folder that make_demo or make_emoji wrote"
        )
    root = (folder / "site").resolve()
    answers = {}
    try:
        for url_path, fields in json.loads(path.read_text(encoding="utf-8")).items():
            answers[url_path] = Answer(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a site description ({error}); generate the corpus again") from None
    for url_path, answer in answers.items():
        if answer.file is not None and not (root / answer.file).resolve().is_relative_to(root):
            raise InputError(
                f"{path}: {url_path} names {answer.file!r}, which is outside {root}; remove the entry"
            )
    return answers


IMAGES = "pictures"  # the site's folder for images that lie on disk: /pictures/<source>/<path>
# Images inside larger files: /packed/<source>/<path>?offset=&size=[&base64=1], or ?lmdb=<key>.
PACKED = "packed"


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a hanging answer must not keep the run from ending
    block_on_close = False
    request_queue_size = 128  # a downloader opens its connections all at once

    def __init__(self, folder: Path | None, images: Mapping[str, str], packed: Mapping[str, str]) -> None:
        self.root = folder / "site" if folder is not None else Path()
        self.answers = read_site(folder) if folder is not None else {}
        self.images, self.packed = dict(images), dict(packed)
        self.environments: dict[str, Any] = {}  # open LMDBs: a process may open each but once
        self.opening = threading.Lock()
        self.stopping = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    def environment(self, path: str) -> Any:
        """The LMDB at a path, opened at its first use."""
        from data_prep.formats.lmdb import open_lmdb

        with self.opening:
            if path not in self.environments:
                self.environments[path] = open_lmdb(path)
            return self.environments[path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the web; the default would print a traceback for each."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "corpus"
    sys_version = ""
    timeout = 30  # seconds that a client may take to send its request

    def do_GET(self) -> None:
        target = urlsplit(self.path)
        if target.netloc not in ("", HOST) or target.scheme not in ("", "http"):
            self._send(Answer(status=403))
            return
        if target.path.startswith(f"/{PACKED}/"):
            self._send_body(*self._packed(unquote(target.path), parse_qs(target.query)))
            self.close_connection = True
            return
        key = target.path + (f"?{target.query}" if target.query else "")
        answer = self.server.answers.get(key) or self._image(unquote(target.path))
        if answer.hang:
            self.server.stopping.wait()
        elif answer.sent_share > 0:
            self._send(answer)
        self.close_connection = True

    def _image(self, path: str) -> Answer:
        """A file below one of the image folders, or 404; never one outside of them."""
        _, _, rest = path.partition(f"/{IMAGES}/")
        name, _, relative = rest.partition("/")
        file = _below(self.server.images.get(name), relative)
        if file is not None and (not store.is_local(file) or os.path.isfile(file)):
            return Answer(file=file, content_type="application/octet-stream")
        return Answer(status=404)

    def _packed(self, path: str, query: Mapping[str, list[str]]) -> tuple[int, bytes]:
        """Status and bytes of an image inside a file below one of the packed folders."""
        name, _, relative = path.removeprefix(f"/{PACKED}/").partition("/")
        file = _below(self.server.packed.get(name), relative)
        if file is None:
            return 404, b""
        try:
            if "lmdb" in query:
                with self.server.environment(file).begin() as transaction:
                    data = transaction.get(query["lmdb"][0].encode())
                return (404, b"") if data is None else (200, decode_base64_image(bytes(data)))
            offset, size = int(query["offset"][0]), int(query["size"][0])
            if offset < 0 or size < 0:
                return 404, b""
            if size > MAX_IMAGE_BASE64_BYTES:
                return 413, b""
            with store.open_read(file) as opened:
                opened.seek(offset)
                data = bytes(opened.read(size))
            return 200, decode_base64_image(data.strip()) if "base64" in query else data
        except (KeyError, ValueError, OSError):
            return 404, b""

    def _send_body(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _send(self, answer: Answer) -> None:
        body = b""
        if answer.file is not None:
            local = store.is_local(answer.file)
            with store.open_read(str(self.server.root / answer.file) if local else answer.file) as file:
                body = bytes(file.read(MAX_IMAGE_BYTES + 1))  # the client refuses more than it may have
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: round(len(body) * answer.sent_share)])

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the download stage counts what it got."""


def _below(root: str | None, relative: str) -> str | None:
    """What lies at a path below a local or remote folder; None for nothing and for what is outside."""
    if root is None or "\0" in relative:
        return None
    if store.is_local(root):
        place = Path(root).resolve()
        file = (place / relative).resolve()
        return str(file) if file.is_relative_to(place) and file.exists() else None
    if {"", ".", ".."} & set(relative.split("/")):
        return None
    url = store.join(root, relative)
    return url if store.exists(url) else None


@contextmanager
def local_site(folder: str) -> Iterator[str]:
    """A corpus folder's site as a local folder: itself, or a copy of a remote one without its tables."""
    if store.is_local(folder):
        yield folder
        return
    with store.local_folder(store.join(folder, "site")) as files, TemporaryDirectory() as copy:
        Path(copy, "site.json").write_bytes(store.read_bytes(store.join(folder, "site.json")))
        Path(copy, "site").symlink_to(files)
        yield copy


@contextmanager
def serve(
    folder: str | Path | None,
    images: Mapping[str, str] | None = None,
    packed: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Serve a corpus folder on a free loopback port for the length of a `with` block.

    `images` maps source names to folders, whose files are served as `/pictures/<source>/<path>`; `packed`
    maps them to folders of TSV, tar or LMDB files, images in which are served by their place in them.
    Folders may be URLs; LMDBs may not.

    Yields `http://127.0.0.1:PORT`, to be used as an HTTP proxy (`http_proxy`) for URLs of `corpus.invalid`
    or as a plain server for their paths. Requests for any other host get 403, unknown paths 404.
    """
    server = _Server(Path(folder) if folder is not None else None, images or {}, packed or {})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
        for environment in server.environments.values():
            environment.close()
