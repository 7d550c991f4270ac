"""Runs img2dataset in a process of its own: `python -m data_prep.download.worker OPTIONS.json`.

img2dataset starts its workers by spawning, and each imports this module as its main module: what is set
at the top holds in all of them.
"""

import functools
import importlib
import io
import json
import os
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Any

from pipeline.core.processes import die_with_parent
from pipeline.core.terminal import guard

# Before img2dataset, whose import takes seconds in which the run may be killed. Workers compare their parent
# with the process that started them: the kernel tells nobody of a parent that was gone before it was asked.
die_with_parent()
_STARTED_BY = "CNCLIP_DOWNLOAD_PID"
if os.environ.setdefault(_STARTED_BY, str(os.getpid())) not in (str(os.getpid()), str(os.getppid())):
    sys.exit("the download that started this worker is gone")
if __name__ in ("__main__", "__mp_main__"):
    sys.stdout, sys.stderr = guard(sys.stdout), guard(sys.stderr)  # the log names addresses

import img2dataset.downloader  # noqa: E402
import img2dataset.writer  # noqa: E402

from data_prep.download.board import BOARD_VARIABLE, Board, report  # noqa: E402
from data_prep.download.deadline import TooManyBytesError  # noqa: E402
from data_prep.download.public_web import (  # noqa: E402
    ALLOWED_VARIABLE,
    MAX_BODY_BYTES,
    AddressRefusedError,
    HttpStatusError,
    open_public,
)
from data_prep.download.resize import UprightResizer  # noqa: E402
from data_prep.sources.local_server import HOST, SITE_VARIABLE  # noqa: E402
from pipeline.core.records import DropReason  # noqa: E402

HTTP_404 = DropReason("http_404")
HTTP_ERROR = DropReason("http_error")
TIMEOUT = DropReason("timeout")
CONNECTION = DropReason("connection")
OPTED_OUT = DropReason("opted_out")
BODY_LIMIT = DropReason("body_limit")
ADDRESS_REFUSED = DropReason("address_refused")  # not of the public web, or redirected to what is not
DNS = DropReason("dns")  # no address for the host's name
TLS = DropReason("tls")

USER_AGENT = "cnclip-pretraining (https://arxiv.org/abs/2211.01335; image-text research)"
_CHUNK_BYTES = 1 << 16


class _Body(io.BytesIO):
    """The bytes that an address gave, for a board to say what is decoded."""

    address: str


def fetch(
    row: Any, timeout: float, user_agent_token: str, disallowed_header_directives: Any
) -> tuple[Any, ...]:
    """img2dataset's `download_image` with an honest user agent, a deadline and a limit on the body.

    `timeout` counts for the whole request, in seconds. Errors begin with a DropReason and a colon.
    """
    key, address = row
    board = _board
    if board is None:
        return _fetch(key, address, timeout, user_agent_token, disallowed_header_directives)
    with board.open(_shown(address)):
        return _fetch(key, address, timeout, user_agent_token, disallowed_header_directives)


def _fetch(
    key: Any, address: str, timeout: float, user_agent_token: str, disallowed_header_directives: Any
) -> tuple[Any, ...]:
    try:
        with open_public(address, {"User-Agent": USER_AGENT}, timeout, _allowed(), _own_site()) as response:
            if disallowed_header_directives and img2dataset.downloader.is_disallowed(
                response.headers, user_agent_token, disallowed_header_directives
            ):
                return key, None, f"{OPTED_OUT}: X-Robots-Tag"
            body = _Body()
            body.address = address
            while chunk := response.read1(_CHUNK_BYTES):
                body.write(chunk)
                if body.tell() > MAX_BODY_BYTES:
                    return key, None, f"{BODY_LIMIT}: more than {MAX_BODY_BYTES} bytes"
            promised = response.headers.get("Content-Length", "")
            if promised.isascii() and promised.isdigit() and body.tell() < int(promised[:20]):
                return key, None, f"{CONNECTION}: {body.tell()} of {promised[:20]} bytes"
            return key, body, None
    except AddressRefusedError as error:
        return key, None, f"{ADDRESS_REFUSED}: {error}"
    except HttpStatusError as error:
        reason = HTTP_404 if error.status in (404, 410) else HTTP_ERROR
        return key, None, f"{reason}: {error.status}"
    except TooManyBytesError:
        return key, None, f"{BODY_LIMIT}: more than {MAX_BODY_BYTES} bytes"
    except TimeoutError as error:
        return key, None, f"{TIMEOUT}: {timeout} s ({error})"
    except socket.gaierror as error:
        return key, None, f"{DNS}: {error}"
    except ssl.SSLError as error:
        return key, None, f"{TLS}: {error}"
    except Exception as error:  # http.client raises many kinds; each is one address that gave nothing
        return key, None, f"{CONNECTION}: {error}"


def _own_site() -> str:
    """Return how addresses of the run's own site begin: only its stage knows the token in them."""
    site = os.environ.get(SITE_VARIABLE)
    return f"http://{site}/" if site else ""


def _shown(address: str) -> str:
    """Return an address without the token of the run's own site."""
    site = _own_site()
    return f"http://{HOST}/{address.removeprefix(site)}" if site and address.startswith(site) else address


def _allowed() -> list[str]:
    return os.environ.get(ALLOWED_VARIABLE, "").split()


_board: Board | None = None  # of this process, once it downloads


def _watched_shard(self: Any, row: Any) -> None:
    """Download a shard as img2dataset does, with a board that says what this process is at."""
    global _board
    folder = os.environ.get(BOARD_VARIABLE)
    if folder is None:
        _download_shard(self, row)
        return
    try:
        if _board is None:
            _board = Board(folder, self.thread_count)
        board = _board
        resizer = self.resizer

        def resize(stream: Any, boxes: Any = None) -> Any:
            with board.decode(_shown(getattr(stream, "address", ""))):
                return resizer(stream, boxes)

        self.resizer = resize
        board.begin_shard(row[0])
        try:
            _download_shard(self, row)
        finally:
            self.resizer = resizer
            board.end_shard()
    except OSError as error:
        report(folder, error)
        raise


def _reporting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of img2dataset's writer: it goes on after a full disk, and would lose row after row."""

    @functools.wraps(method)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except OSError as error:
            if folder := os.environ.get(BOARD_VARIABLE):
                report(folder, error)
            raise

    return wrapped


img2dataset.downloader.download_image = fetch
_download_shard = img2dataset.downloader.Downloader.download_shard
img2dataset.downloader.Downloader.download_shard = _watched_shard
_Writer = img2dataset.writer.WebDatasetSampleWriter
for _name in ("__init__", "write", "close"):
    setattr(_Writer, _name, _reporting(getattr(_Writer, _name)))


def main() -> None:
    """Read the options that `data_prep.download.stage` wrote and download."""
    with open(sys.argv[1], encoding="utf-8") as file:
        options = json.load(file)
    resizer = UprightResizer(**options.pop("resizer"))
    program = importlib.import_module("img2dataset.main")  # the package hides it behind a function
    program.Resizer = lambda **_: resizer  # type: ignore[attr-defined]
    program.download(**options)


if __name__ == "__main__":
    main()
