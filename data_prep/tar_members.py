"""Tar files of samples: written with fixed times and owners, read by offset."""

import hashlib
import io
import tarfile
from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass(frozen=True, slots=True)
class Place:
    """Where a member's data lies in its tar."""

    offset_bytes: int
    size_bytes: int
    sha256: str  # of the member's data


class TarWriter:
    """Writes members so that the same samples give the same bytes: no times, owners or padding of chance."""

    def __init__(self, path: str) -> None:
        self._tar = tarfile.open(  # noqa: SIM115
            path, "w", format=tarfile.USTAR_FORMAT
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()

    def add(self, name: str, data: bytes) -> Place:
        """Append one member and say where its data begins."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        offset_bytes = self._tar.offset + tarfile.BLOCKSIZE  # USTAR: one header block, then the data
        self._tar.addfile(member, io.BytesIO(data))
        return Place(offset_bytes, len(data), hashlib.sha256(data).hexdigest())
