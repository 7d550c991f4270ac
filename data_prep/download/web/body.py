"""Reads what an answer holds, with a limit, and unpacks what its server packed without being asked to."""

import io
import zlib
from typing import Any

from data_prep.download.web.deadline import TooManyBytesError
from data_prep.download.web.response import Response
from pipeline.core.files.image_formats import begins_as_image

_CHUNK_BYTES = 1 << 16
_ZLIB = ("gzip", "x-gzip", "deflate")  # Content-Encodings that zlib reads, as both of its headers
# Others that compress (IANA's registry). Any further name, such as `utf-8` or `none`, is one that its server
# means for something else: the bytes are then what they are.
_UNREADABLE = ("br", "zstd", "dcb", "dcz", "compress", "x-compress", "exi", "pack200-gzip", "aes128gcm")
_ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS


class Body(io.BytesIO):
    """The bytes that an address gave, for a board to say what is decoded."""

    address: str


class CutOffError(OSError):
    """The answer ended before its end."""


class ContentEncodingError(Exception):
    """The body is compressed in a way that cannot be read."""


class _Content:
    """Decodes what a server packed with gzip or deflate, asked or not; other bytes stay as they are.

    Servers also name an encoding that they do not use: only bytes that begin as packed ones do are decoded.
    """

    def __init__(self, encodings: list[str]) -> None:
        self.num_received = 0
        self._may_be_packed = any(name in _ZLIB for name in encodings)
        self._unreadable = next((name for name in encodings if name in _UNREADABLE), None)
        self._decoder: Any = None

    def decode(self, chunk: bytes, most: int) -> bytes:
        """Return the next bytes, at most so many: a bomb ends at the limit."""
        if self.num_received == 0:
            if self._may_be_packed and _begins_packed(chunk):
                self._decoder = zlib.decompressobj(_ZLIB_OR_GZIP)
            elif self._unreadable and not begins_as_image(chunk):
                raise ContentEncodingError(self._unreadable)
        self.num_received += len(chunk)
        if self._decoder is None:
            return chunk
        try:
            decoded: bytes = self._decoder.decompress(self._decoder.unconsumed_tail + chunk, most)
        except zlib.error as error:
            raise ContentEncodingError(f"cannot be decoded ({error})") from None
        return decoded

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing at the end."""
        return self._decoder is None or self._decoder.eof


def _begins_packed(chunk: bytes) -> bool:
    """Whether bytes begin as gzip (RFC 1952, 2.3.1) or zlib (RFC 1950, 2.2) do."""
    is_zlib = len(chunk) > 1 and chunk[0] & 0x0F == 8 and int.from_bytes(chunk[:2]) % 31 == 0
    return chunk.startswith(b"\x1f\x8b") or is_zlib


def read_body(response: Response, most: int, *, is_start_enough: bool = False) -> Body:
    """Return a response's content, unpacked; if so asked, only its start if it has more than `most` bytes.

    Raises:
        TooManyBytesError: if it has more than `most` bytes, packed or not.
        CutOffError: if it ends too early.
        ContentEncodingError: if it is packed in a way that cannot be read.
    """
    named = ",".join(response.headers.get_all("content-encoding"))
    content = _Content([name.strip().lower() for name in named.split(",")])
    body = Body()
    while chunk := response.read1(_CHUNK_BYTES):
        body.write(content.decode(chunk, most + 1 - body.tell()))
        if max(content.num_received, body.tell()) > most:
            if is_start_enough:
                return body
            raise TooManyBytesError("more bytes than an answer may have")
    promised = response.headers.get("content-length") or ""
    if promised.isascii() and promised.isdigit() and content.num_received < int(promised[:20]):
        raise CutOffError(f"{content.num_received} of {promised[:20]} bytes")
    if not content.is_whole:
        raise CutOffError(f"{named.strip().lower()} data that ends too early")
    return body
