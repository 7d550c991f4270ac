"""The headers of an answer.

Reading them with Python's email package, as http.client does, takes half of the CPU time of a small image.
"""

import http.client
from typing import BinaryIO

_MOST_LINES = 100  # http.client's limits
_MOST_BYTES = 65_536  # of a line


# Those that the download or http.client asks for; taking the others apart would be in vain.
_READ = frozenset(
    b"connection content-encoding content-length keep-alive location proxy-connection retry-after"
    b" tdm-reservation transfer-encoding x-robots-tag".split()
)


class Headers:
    """Those that are read, each with its values in their order; what no header can be is passed over."""

    def __init__(self, lines: list[bytes]) -> None:
        self._values: dict[str, list[str]] = {}
        last: list[str] | None = None
        for line in lines:
            if line[0] in b" \t":  # the last one continues, RFC 9112, 5.2
                if last is not None:
                    last[-1] = f"{last[-1]} {line.decode('latin-1').strip()}".strip()
                continue
            name, _, value = line.partition(b":")
            name = name.strip().lower()
            last = None
            if name in _READ:
                last = self._values.setdefault(name.decode("ascii"), [])
                last.append(value.decode("latin-1").strip())

    def get(self, name: str) -> str | None:
        """Return the first value of a header; its name in small letters."""
        return self._values[name][0] if name in self._values else None

    def get_all(self, name: str) -> list[str]:
        """Return all values; none if there is no such header."""
        return self._values.get(name, [])


def read_headers(file: BinaryIO) -> Headers:
    """Read the headers of an answer with the line that ends them.

    Raises:
        http.client.HTTPException: for more lines, or longer ones, than an answer may have.
    """
    lines: list[bytes] = []
    while True:
        line = file.readline(_MOST_BYTES + 1)
        if len(line) > _MOST_BYTES:
            raise http.client.LineTooLong("header line")
        if line in (b"\r\n", b"\n", b""):
            return Headers(lines)
        if len(lines) == _MOST_LINES:
            raise http.client.HTTPException(f"got more than {_MOST_LINES} headers")
        lines.append(line)
