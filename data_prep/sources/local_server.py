"""A small web site on loopback that serves a corpus's images from disk and can misbehave like the real web.

A site is a folder with `site.json`, which maps URL paths to answers, and `site/`, which holds the
files. In tables its URLs have the host `corpus.invalid` (a name reserved by RFC 2606, so it never resolves),
so that a corpus has the same bytes wherever and however often it is served. The server answers only clients
that know its run's token, which `data_prep.download.own_images` puts into the addresses of rows that may ask.
"""

import contextlib
import dataclasses
import hmac
import io
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any
from urllib.parse import parse_qs, unquote, urlsplit

from data_prep.formats.base64_image import decode_base64_image
from pipeline.core import store
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import InputError
from pipeline.core.shard_format import MAX_IMAGE_BASE64_BYTES, ByteRanges

HOST = "corpus.invalid"
SITE_VARIABLE = "CNCLIP_SITE"  # environment variable of the download workers: host:port/token of the server


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the site does when one path is asked for."""

    file: str | None = None  # the body, relative to site/; none: an empty body
    content_type: str = "image/jpeg"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)  # besides Content-Type and Content-Length
    hang: bool = False  # accept the request and never answer
    sent_share: float = 1.0  # of the promised body, before the connection closes; 0: no answer


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
    """Read `site.json`.

    Raises:
        InputError: if it is missing or malformed, or names a file outside `site/`.
    """
    path = folder / "site.json"
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a site is served from the folder that make_demo or make_emoji wrote"
        )
    root = (folder / "site").resolve()
    answers = {}
    try:
        for url_path, fields in parse_json(store.read_text(str(path))).items():
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
UNPACKED = "unpacked"  # the same for files that the corpus stage wrote itself
_BLOCK_BYTES = 1 << 20
_TOKEN_BYTES = 24


def shown_address(address: str) -> str:
    """Return an address for people: of an image on disk, which the run serves to itself, the table's path."""
    of_run = f"http://{HOST}/{IMAGES}/"
    if not address.startswith(of_run):
        return address
    return unquote(address.removeprefix(of_run).partition("/")[2])


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a hanging answer must not keep the run alive
    block_on_close = False
    request_queue_size = 128  # a downloader opens its connections all at once

    def __init__(
        self,
        folder: Path | None,
        images: Mapping[str, str],
        packed: Mapping[str, str],
        unpacked: Mapping[str, str],
    ) -> None:
        self.root = folder / "site" if folder is not None else Path()
        self.token = secrets.token_urlsafe(_TOKEN_BYTES)
        self.answers = read_site(folder) if folder is not None else {}
        self.images = dict(images)
        self.inside = {PACKED: dict(packed), UNPACKED: dict(unpacked)}  # folders of larger files
        self.environments: dict[str, Any] = {}  # open LMDBs: a process may open each only once
        self.opening = threading.Lock()
        self.stopping = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    def environment(self, path: str) -> Any:
        """Return the LMDB at a path, opening it on first use."""
        from data_prep.formats.lmdb import open_lmdb

        with self.opening:
            if path not in self.environments:
                self.environments[path] = open_lmdb(path)
            return self.environments[path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up; the default prints a traceback for each."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "corpus"
    sys_version = ""
    timeout = 30  # seconds that a client may take to send its request

    def do_GET(self) -> None:
        self.close_connection = True
        path = self._path_asked()
        if path is None:
            self._send(Answer(status=403))
            return
        target = urlsplit(path)
        for kind, folders in self.server.inside.items():
            if target.path.startswith(f"/{kind}/"):
                place = unquote(target.path).removeprefix(f"/{kind}/")
                self._send_body(*self._packed(folders, place, parse_qs(target.query)))
                return
        answer = self.server.answers.get(path) or self._image(unquote(target.path))
        if answer.hang:
            self.server.stopping.wait()
        elif answer.sent_share > 0:
            self._send(answer)

    def _path_asked(self) -> str | None:
        """Return the path and query after the token; None if the token or the Host header is wrong.

        A web page open in a browser on this machine can send requests here through a host name that resolves
        to loopback, but it does not know the token, and its Host header gives it away.
        """
        own = {HOST, f"127.0.0.1:{self.server.server_address[1]}"}
        if not {*self.headers.get_all("Host", [""])} <= own:
            return None
        token, slash, path = self.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("latin-1", "replace"), self.server.token.encode()):
            return None
        return slash + path

    def _image(self, path: str) -> Answer:
        """Return a file below one of the image folders, otherwise 404; never a file outside them."""
        _, _, rest = path.partition(f"/{IMAGES}/")
        name, _, relative = rest.partition("/")
        file = _below(self.server.images.get(name), relative)
        if file is not None and (not store.is_local(file) or os.path.isfile(file)):
            return Answer(file=file, content_type="application/octet-stream")
        return Answer(status=404)

    def _packed(
        self, folders: Mapping[str, str], place: str, query: Mapping[str, list[str]]
    ) -> tuple[int, bytes]:
        """Return status and bytes of an image inside a file below one of the folders."""
        name, _, relative = place.partition("/")
        file = _below(folders.get(name), relative)
        if file is None:
            return 404, b""
        try:
            if "lmdb" in query:
                with self.server.environment(file).begin() as transaction:
                    data = transaction.get(query["lmdb"][0].encode())
                return (404, b"") if data is None else (200, decode_base64_image(bytes(data)))
            if store.is_local(file) and not os.path.isfile(file):
                return 404, b""
            offset, size = int(query["offset"][0]), int(query["size"][0])
            with ByteRanges(file, max_bytes=MAX_IMAGE_BASE64_BYTES) as ranges:
                data = ranges.read(offset, size, "an image")
            return 200, decode_base64_image(data.strip()) if "base64" in query else data
        except (InputError, KeyError, ValueError, OverflowError, OSError):
            return 404, b""

    def _send_body(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _send(self, answer: Answer) -> None:
        with contextlib.ExitStack() as stack:
            body: IO[Any] = io.BytesIO()
            num_bytes = 0
            if answer.file is not None:
                is_local = store.is_local(answer.file)
                path = str(self.server.root / answer.file) if is_local else answer.file
                body = stack.enter_context(store.open_read(path))
                num_bytes = body.seek(0, os.SEEK_END)
                body.seek(0)
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(num_bytes))
            self.send_header("Connection", "close")
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            left = round(num_bytes * answer.sent_share)
            while left > 0 and (block := body.read(min(left, _BLOCK_BYTES))):
                self.wfile.write(block)
                left -= len(block)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the download stage counts the results."""


def _below(root: str | None, relative: str) -> str | None:
    """Return the full path of a file below a local or remote folder; None if it would lie outside."""
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
    """Return a corpus folder's site as a local folder, copying a remote one without its tables."""
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
    unpacked: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Serve a corpus folder on a free loopback port for the duration of a `with` block.

    `images` maps source names to folders, whose files are served as `/pictures/<source>/<path>`; `packed`
    maps them to folders of TSV, tar, Arrow, Parquet or LMDB files, and serves images inside these files by
    position; `unpacked` maps them to such folders of the run. Folders may be URLs, except those with LMDBs.

    Yields `http://127.0.0.1:PORT/TOKEN`, which stands for `http://corpus.invalid` in the site's URLs.
    Requests without the token or for any other host get 403, unknown paths 404.
    """
    server = _Server(Path(folder) if folder is not None else None, images or {}, packed or {}, unpacked or {})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/{server.token}"
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
        for environment in server.environments.values():
            environment.close()
