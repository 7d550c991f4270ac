"""Fetches one image's bytes as img2dataset asks for them, or says why not."""

import io
import os
import socket
import ssl
from typing import Any

import img2dataset.downloader

from data_prep.download.deadline import TooManyBytesError
from data_prep.download.public_web import (
    ALLOWED_VARIABLE,
    AddressRefusedError,
    HttpStatusError,
    open_public,
)
from data_prep.sources.local_server import HOST, SITE_VARIABLE
from pipeline.core.records import DropReason
from pipeline.core.shard_format import MAX_IMAGE_BYTES, too_large

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


class Body(io.BytesIO):
    """The bytes that an address gave, for a board to say what is decoded."""

    address: str


def fetch_image(
    key: Any, address: str, timeout: float, user_agent_token: str, disallowed_header_directives: Any
) -> tuple[Any, Body | None, str | None]:
    """Return the key, and the body that an address gave, or why it gave none.

    An error begins with a DropReason and a colon. `timeout` counts for the whole request, in seconds.
    """
    try:
        with open_public(address, {"User-Agent": USER_AGENT}, timeout, _allowed(), _own_site()) as response:
            if disallowed_header_directives and img2dataset.downloader.is_disallowed(
                response.headers, user_agent_token, disallowed_header_directives
            ):
                return key, None, f"{OPTED_OUT}: X-Robots-Tag"
            body = Body()
            body.address = address
            while chunk := response.read1(_CHUNK_BYTES):
                body.write(chunk)
                if body.tell() > MAX_IMAGE_BYTES:
                    return key, None, f"{BODY_LIMIT}: {too_large()}"
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
        return key, None, f"{BODY_LIMIT}: {too_large()}"
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


def shown(address: str) -> str:
    """Return an address without the token of the run's own site."""
    site = _own_site()
    return f"http://{HOST}/{address.removeprefix(site)}" if site and address.startswith(site) else address


def _allowed() -> list[str]:
    return os.environ.get(ALLOWED_VARIABLE, "").split()
