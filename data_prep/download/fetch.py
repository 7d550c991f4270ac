"""Fetches one image's bytes for img2dataset, or gives the reason why not."""

import io
import os
import socket
import ssl
import zlib
from typing import Any

import img2dataset.downloader

from data_prep.download.deadline import TooManyBytesError
from data_prep.download.public_web import (
    ALLOWED_VARIABLE,
    AddressRefusedError,
    HttpStatusError,
    TooManyRedirectsError,
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
ADDRESS_REFUSED = DropReason("address_refused")  # not on the public web, or redirected away from it
REDIRECTS = DropReason("too_many_redirects")
CONTENT_ENCODING = DropReason("content_encoding")  # compressed in a way that was not asked for
DNS = DropReason("dns")  # no address for the host's name
TLS = DropReason("tls")

USER_AGENT = "cnclip-pretraining (https://arxiv.org/abs/2211.01335; image-text research)"
_CHUNK_BYTES = 1 << 16
_ZLIB = ("gzip", "x-gzip", "deflate")  # Content-Encodings that zlib reads, as both of its headers
_ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS


class Body(io.BytesIO):
    """The body from an address, which a board reads to name what is being decoded."""

    address: str


class _Content:
    """Decodes gzip and deflate bodies, requested or not; other bytes stay as they are.

    Some servers name an encoding that they do not use, so only bytes with a gzip or zlib header are decoded.
    """

    def __init__(self, *, is_packed: bool) -> None:
        self.num_received = 0
        self._may_be_packed = is_packed
        self._decoder: Any = None

    def decode(self, chunk: bytes, most: int) -> bytes:
        """Return the next bytes up to a limit, which stops decompression bombs."""
        if self.num_received == 0 and self._may_be_packed and _begins_packed(chunk):
            self._decoder = zlib.decompressobj(_ZLIB_OR_GZIP)
        self.num_received += len(chunk)
        if self._decoder is None:
            return chunk
        decoded: bytes = self._decoder.decompress(self._decoder.unconsumed_tail + chunk, most)
        return decoded

    @property
    def is_whole(self) -> bool:
        """Return whether the data ended where it should."""
        return self._decoder is None or self._decoder.eof


def _begins_packed(chunk: bytes) -> bool:
    """Return whether bytes begin with a gzip (RFC 1952, 2.3.1) or zlib (RFC 1950, 2.2) header."""
    is_zlib = len(chunk) > 1 and chunk[0] & 0x0F == 8 and int.from_bytes(chunk[:2]) % 31 == 0
    return chunk.startswith(b"\x1f\x8b") or is_zlib


def fetch_image(
    key: Any, address: str, timeout: float, user_agent_token: str, disallowed_header_directives: Any
) -> tuple[Any, Body | None, str | None]:
    """Return the key, and the body from an address or the reason why there is none.

    An error begins with a DropReason and a colon. `timeout` limits the whole request, in seconds.
    """
    try:
        with open_public(address, {"User-Agent": USER_AGENT}, timeout, _allowed(), _own_site()) as response:
            if disallowed_header_directives and img2dataset.downloader.is_disallowed(
                response.headers, user_agent_token, disallowed_header_directives
            ):
                return key, None, f"{OPTED_OUT}: X-Robots-Tag"
            encoding = response.headers.get("Content-Encoding", "").strip().lower()
            if encoding not in ("", "identity", *_ZLIB):
                return key, None, f"{CONTENT_ENCODING}: {encoding}"
            content = _Content(is_packed=encoding in _ZLIB)
            body = Body()
            body.address = address
            while chunk := response.read1(_CHUNK_BYTES):
                body.write(content.decode(chunk, MAX_IMAGE_BYTES + 1 - body.tell()))
                if max(content.num_received, body.tell()) > MAX_IMAGE_BYTES:
                    return key, None, f"{BODY_LIMIT}: {too_large()}"
            promised = response.headers.get("Content-Length", "")
            if promised.isascii() and promised.isdigit() and content.num_received < int(promised[:20]):
                return key, None, f"{CONNECTION}: {content.num_received} of {promised[:20]} bytes"
            if not content.is_whole:
                return key, None, f"{CONNECTION}: {encoding} data that ends too early"
            return key, body, None
    except zlib.error as error:
        return key, None, f"{CONTENT_ENCODING}: cannot be decoded ({error})"
    except TooManyRedirectsError as error:
        return key, None, f"{REDIRECTS}: {error}"
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
    except Exception as error:  # http.client raises many kinds; each costs one address
        return key, None, f"{CONNECTION}: {error}"


def _own_site() -> str:
    """Return the prefix of the addresses of the run's own site; only its stage knows the token in it."""
    site = os.environ.get(SITE_VARIABLE)
    return f"http://{site}/" if site else ""


def shown(address: str) -> str:
    """Return an address without the token of the run's own site."""
    site = _own_site()
    return f"http://{HOST}/{address.removeprefix(site)}" if site and address.startswith(site) else address


def _allowed() -> list[str]:
    return os.environ.get(ALLOWED_VARIABLE, "").split()
