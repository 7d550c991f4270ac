"""Reads the lines of a text table in any encoding, in pieces of bounded size.

Parsers stop at the first invalid byte; here it becomes U+FFFD, so that only its row is lost. If a whole table
is not UTF-8, the error names its likely encoding and the setting that reads it.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from typing import IO, Any

from data_prep.sources.text_rows import TextLayout
from pipeline.core import store
from pipeline.core.records import InputError

BLOCK_BYTES = 16 << 20  # read at once; also the longest row
LINES_AT_ONCE = 1 << 16  # so that rows set aside take little memory, too
_HEAD_BYTES = 1 << 20  # looked at to learn how a table is written
_CJK = ("\u4e00", "\u9fff")


def plain_name(path: str) -> str:
    """Return a file's name in lower case, without `.gz`."""
    return path.lower().removesuffix(".gz")


def unreadable(path: str, text: str) -> InputError:
    """Return the error for a table that cannot be read."""
    return InputError(f"{path}: cannot be read as a table: {text}; repair or replace the file")


def too_long(path: str) -> InputError:
    """Return the error for a row without end."""
    return unreadable(
        path,
        f"a row is longer than {BLOCK_BYTES >> 20} MiB, most likely a quote that is never closed",
    )


def head_of(path: str, layout: TextLayout) -> str:
    """Return the beginning of a table, cut at a line end if possible.

    Raises:
        InputError: if the table is in another encoding.
    """
    text, is_whole, _ = _look(path, layout)
    return text if is_whole or "\n" not in text else text[: text.rindex("\n")]


def lines_of(path: str, layout: TextLayout) -> Iterator[list[str]]:
    """Yield the lines of a table in order, without their ends, at most LINES_AT_ONCE of them at a time."""
    decoder, rest = _decoder(layout), ""
    _, _, from_macintosh = _look(path, layout)
    with _open(path) as file:
        while True:
            raw = _read(file, BLOCK_BYTES, path)
            block = decoder.decode(raw, final=not raw)
            if from_macintosh:
                block = block.replace("\r", "\n")
            lines = (rest + block).split("\n")
            rest = lines.pop() if raw else ""
            for first in range(0, len(lines), LINES_AT_ONCE):
                yield lines[first : first + LINES_AT_ONCE]
            if not raw:
                return
            if len(rest) > BLOCK_BYTES:
                raise too_long(path)


def blocks_of(path: str, layout: TextLayout) -> Iterator[str]:
    """Yield the text of a table in pieces."""
    decoder = _decoder(layout)
    with _open(path) as file:
        while raw := _read(file, BLOCK_BYTES, path):
            yield decoder.decode(raw)
        yield decoder.decode(b"", final=True)


def _look(path: str, layout: TextLayout) -> tuple[str, bool, bool]:
    """Return the beginning, whether it is the whole table, and whether its lines end with a bare CR."""
    with _open(path) as file:
        raw = _read(file, _HEAD_BYTES, path)
    if layout.encoding is None:
        _refuse_other_encoding(path, raw)
    is_whole = len(raw) < _HEAD_BYTES
    text = _decoder(layout).decode(raw, final=is_whole)
    only_returns = "\n" not in text and "\r" in text
    return text.replace("\r", "\n") if only_returns else text, is_whole, only_returns


def _decoder(layout: TextLayout) -> codecs.IncrementalDecoder:
    name = codecs.lookup(layout.encoding or "utf-8").name
    return codecs.getincrementaldecoder("utf-8-sig" if name == "utf-8" else name)("replace")


def _open(path: str) -> IO[Any]:
    file = store.open_read(path)
    return gzip.GzipFile(fileobj=file) if path.lower().endswith(".gz") else file  # type: ignore[arg-type, return-value]


def _read(file: IO[Any], size: int, path: str) -> bytes:
    try:
        return bytes(file.read(size))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise unreadable(path, str(error).splitlines()[0]) from None


def _refuse_other_encoding(path: str, raw: bytes) -> None:
    """Raise InputError if a whole table is not UTF-8 and its encoding can be recognised."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _other_encoding(path, "UTF-16", "utf-16")
    start = raw[:4096]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if min(len(start) // 2, 4) and max(even, odd) > len(start) // 8 and min(even, odd) < len(start) // 64 + 1:
        name = "utf-16-le" if odd > even else "utf-16-be"
        raise _other_encoding(path, "UTF-16 without a byte-order mark", name)
    lines = raw.split(b"\n")
    lines = [line for line in (lines[:-1] if len(raw) == _HEAD_BYTES else lines) if not line.isascii()]
    if lines and not any(_decodes(line, "utf-8") for line in lines):
        chinese = sum(
            _decodes(line, "gb18030")
            and any(_CJK[0] <= letter <= _CJK[1] for letter in line.decode("gb18030"))
            for line in lines
        )
        if chinese >= 0.9 * len(lines):
            raise _other_encoding(path, "GB18030 (or GBK)", "gb18030")


def _other_encoding(path: str, what: str, name: str) -> InputError:
    return InputError(
        f'{path}: not UTF-8: it looks like {what}; set encoding = "{name}" in its source, or write it as'
        " UTF-8"
    )


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
