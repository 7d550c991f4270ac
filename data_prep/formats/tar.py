"""Tar files of samples: written with fixed times and owners, read by offset."""

import hashlib
import tarfile
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pipeline.core.files.written import check_size


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a member's data in its tar."""

    offset_bytes: int
    size_bytes: int
    sha256: str  # of the member's data


class TarWriter:
    """Writes members so that the same samples give the same bytes: no times, owners or padding of chance.

    The bytes are those of Python's tarfile (USTAR), whose header takes longer to make than an image to copy.
    They are hashed as they are written, so that nobody has to read the file back.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open(path, "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115
        self._offset = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            end = bytes(2 * tarfile.BLOCKSIZE)
            end += bytes(-(self._offset + len(end)) % tarfile.RECORDSIZE)
            self._write(end)
        if error is None:
            check_size(self._path, self._path, self._offset + len(end))

    @property
    def sha256(self) -> str:
        """The digest of the whole file, hex, once the block has ended."""
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def append(self, name: str, data: bytes) -> int:
        """Append one member and return where its data begins, in bytes."""
        offset_bytes = self._offset + tarfile.BLOCKSIZE  # USTAR: one header block, then the data
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        for piece in (_header(name, len(data)), data, padding):
            self._write(piece)
        self._offset = offset_bytes + len(data) + len(padding)
        return offset_bytes

    def add(self, name: str, data: bytes) -> Place:
        """Append one member and return where its data begins and what its digest is."""
        return Place(self.append(name, data), len(data), hashlib.sha256(data).hexdigest())


def _member(name: str, num_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = num_bytes
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


_BUFFER_BYTES = 1 << 20
_PLAIN = _member("", 0)
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)
# The checksum counts its own field as spaces, and the size's digits as they are.
_PLAIN_SUM = sum(_PLAIN) - sum(_PLAIN[_CHECKSUM]) + 8 * ord(" ") - sum(_PLAIN[_SIZE])
_MAX_PLAIN_BYTES = 8**11


def _header(name: str, num_bytes: int) -> bytes:
    """Return the header block of a plain file; tarfile handles what does not fit its fields."""
    if len(name) > 100 or not name.isascii() or "/" in name or num_bytes >= _MAX_PLAIN_BYTES:
        return _member(name, num_bytes)
    encoded, size = name.encode("ascii"), b"%011o\0" % num_bytes
    checksum = b"%06o\0 " % (_PLAIN_SUM + sum(encoded) + sum(size))
    return b"".join(
        [encoded.ljust(100, b"\0"), _PLAIN[100:124], size, _PLAIN[136:148], checksum, _PLAIN[156:]]
    )
