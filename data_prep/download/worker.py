"""Runs img2dataset in a process of its own: `python -m data_prep.download.worker OPTIONS.json`.

img2dataset starts its workers by spawning, and each imports this module as its main module: what is set
at the top holds in all of them.
"""

import importlib
import io
import json
import os
import socket
import ssl
import string
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from pipeline.core.processes import die_with_parent

# Before img2dataset, whose import takes seconds in which the run may be killed. Workers compare their parent
# with the process that started them: the kernel tells nobody of a parent that was gone before it was asked.
die_with_parent()
_STARTED_BY = "CNCLIP_DOWNLOAD_PID"
if os.environ.setdefault(_STARTED_BY, str(os.getpid())) not in (str(os.getpid()), str(os.getppid())):
    sys.exit("the download that started this worker is gone")

import img2dataset.downloader  # noqa: E402

from data_prep.download.public_web import ALLOWED_VARIABLE, AddressRefusedError, open_public  # noqa: E402
from data_prep.download.resize import UprightResizer  # noqa: E402
from data_prep.sources.local_server import HOST, SITE_VARIABLE  # noqa: E402
from pipeline.core.records import DropReason  # noqa: E402
from pipeline.core.shard_format import MAX_IMAGE_BYTES, too_large  # noqa: E402

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


def fetch(
    row: Any, timeout: float, user_agent_token: str, disallowed_header_directives: Any
) -> tuple[Any, ...]:
    """img2dataset's `download_image` with an honest user agent, a deadline and a limit on the body.

    `timeout` counts for the whole request, in seconds. Errors begin with a DropReason and a colon.
    """
    key, url = row
    deadline = time.monotonic() + timeout
    try:
        # Chinese characters and spaces in an address are common, and not ASCII; what is quoted stays so.
        address = urllib.parse.quote(url, safe=string.punctuation)
        with open_public(address, {"User-Agent": USER_AGENT}, timeout, _allowed(), _to_own_site) as response:
            if disallowed_header_directives and img2dataset.downloader.is_disallowed(
                response.headers, user_agent_token, disallowed_header_directives
            ):
                return key, None, f"{OPTED_OUT}: X-Robots-Tag"
            body = io.BytesIO()
            while chunk := response.read1(_CHUNK_BYTES):
                body.write(chunk)
                if body.tell() > MAX_IMAGE_BYTES:
                    return key, None, f"{BODY_LIMIT}: {too_large()}"
                if time.monotonic() > deadline:
                    return key, None, f"{TIMEOUT}: {timeout} s"
            promised = response.headers.get("Content-Length")
            if promised is not None and promised.isdigit() and body.tell() < int(promised):
                return key, None, f"{CONNECTION}: {body.tell()} of {promised} bytes"
            return key, body, None
    except AddressRefusedError as error:
        return key, None, f"{ADDRESS_REFUSED}: {error}"
    except urllib.error.HTTPError as error:
        reason = HTTP_404 if error.code in (404, 410) else HTTP_ERROR
        return key, None, f"{reason}: {error.code}"
    except TimeoutError:
        return key, None, f"{TIMEOUT}: {timeout} s"
    except urllib.error.URLError as error:
        for kind, reason in ((TimeoutError, TIMEOUT), (socket.gaierror, DNS), (ssl.SSLError, TLS)):
            if isinstance(error.reason, kind):
                return key, None, f"{reason}: {error.reason}"
        return key, None, f"{CONNECTION}: {error.reason}"
    except Exception as error:  # http.client and ssl raise many kinds; each is one address that gave nothing
        return key, None, f"{CONNECTION}: {error}"


def _to_own_site(request: urllib.request.Request) -> bool:
    """Send requests for the corpus's own host to its loopback server: the name never resolves."""
    if request.host != HOST or SITE_VARIABLE not in os.environ:
        return False
    request.set_proxy(os.environ[SITE_VARIABLE], "http")
    return True


def _allowed() -> list[str]:
    return os.environ.get(ALLOWED_VARIABLE, "").split()


img2dataset.downloader.download_image = fetch


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
