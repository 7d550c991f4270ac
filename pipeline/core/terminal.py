"""Keeps control characters in untrusted names, captions and messages away from terminals and logs.

A file name, a tensor's name or a server's answer may contain escape sequences that recolour a terminal, move
its cursor or set its title, and marks that change the direction of text. `guarded_output` wraps every command
so that all output passes `visible`.
"""

import contextlib
import enum
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

# Control characters (C0 except tab and line feed, DEL, C1), line and paragraph separators, marks that change
# the direction of text (UAX 9), deprecated format characters, and unpaired surrogates, which represent bytes
# of a name that are not UTF-8 and cannot be encoded.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff]"
)
# Characters shown of a word, which may be a path, and of a line.
_WORD_CHARACTERS, _LINE_CHARACTERS = 500, 1800
_LONG_WORD = re.compile(rf"\S{{{_WORD_CHARACTERS + 1},}}")


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    # The same escapes as JSON for characters above C0, so that a line of JSON stays valid.
    return f"\\x{number:02x}" if number < 0x20 else f"\\u{number:04x}"


def visible(text: str) -> str:
    """Return text with control characters escaped, such as \\x1b, except line ends and tabs."""
    return _UNSEEN.sub(_escape, text)


def one_line(text: str) -> str:
    """Return text like `visible`, with line ends escaped too, so that a name cannot begin another line.

    The middle of very long words and lines is cut out, because a key in a damaged file may be endless.
    """
    line = visible(text).replace("\n", "\\n")
    if len(line) > _WORD_CHARACTERS:
        line = _LONG_WORD.sub(lambda word: _shortened(word[0], _WORD_CHARACTERS), line)
    return _shortened(line, _LINE_CHARACTERS)


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    cut = f" … [{len(text) - most:,} characters] … "
    return text[: most - most // 3] + cut + text[len(text) - most // 3 :]


class _Line(enum.Enum):
    """The kind of a stream's last line."""

    EMPTY = enum.auto()
    TEXT = enum.auto()
    BAR = enum.auto()  # begun with a carriage return: a progress bar that redraws itself


class _Guarded:
    """A stream that passes text through `visible`.

    On a terminal a carriage return passes at the start of a line or of its replacement, since that is how
    tqdm redraws bars. After other text it is escaped, because it would overwrite that text.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._line = _Line.EMPTY

    def write(self, text: str) -> int:
        self.stream.write(self._passing(text))
        return len(text)

    def _passing(self, text: str) -> str:
        shown = text
        if text.startswith("\r") and self._line is not _Line.TEXT and self.stream.isatty():
            self._line, shown = _Line.BAR, text[1:]
        last = shown.rpartition("\n")[2]
        if "\n" in shown:
            self._line = _Line.TEXT if last else _Line.EMPTY
        elif last and self._line is _Line.EMPTY:
            self._line = _Line.TEXT
        return text[: len(text) - len(shown)] + visible(shown)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard(stream: TextIO) -> TextIO:
    """Return the guarded stream; an already guarded one is returned unchanged."""
    if isinstance(stream, _Guarded) or stream is None:
        return stream
    if (stream.encoding or "").lower().replace("-", "") != "utf8":
        with contextlib.suppress(AttributeError, ValueError):  # not every substitute for a stream can
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
    return cast(TextIO, _Guarded(stream))


def unguarded(stream: TextIO) -> TextIO:
    """Return the underlying stream, for code that draws on a terminal; its texts must pass `one_line`."""
    return stream.stream if isinstance(stream, _Guarded) else stream


class Verbosity(enum.IntEnum):
    """How much a command prints on standard error in addition to warnings and errors."""

    QUIET = -1  # no progress and no notes
    NORMAL = 0
    VERBOSE = 1  # also a line for each stage that ran, and where an error was raised


_verbosity = Verbosity.NORMAL


def set_verbosity(verbosity: Verbosity) -> None:
    """Set how much this process prints."""
    global _verbosity
    _verbosity = verbosity


def verbosity() -> Verbosity:
    """Return how much this process prints."""
    return _verbosity


def inform(text: str) -> None:
    """Print a line to standard error, unless the command is quiet."""
    if _verbosity > Verbosity.QUIET:
        print(one_line(text), file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print a note to standard error, unless the command is quiet."""
    inform(f"note: {text}")


def detail(text: str) -> None:
    """Print a line to standard error if the command is verbose."""
    if _verbosity >= Verbosity.VERBOSE:
        print(one_line(text), file=sys.stderr, flush=True)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines to standard output; text quoted in them cannot begin further lines."""
    for line in lines:
        print(one_line(line))


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """Guard standard output and standard error.

    They stay guarded if an exception leaves the block, because the interpreter then prints its message.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = guard(sys.stdout), guard(sys.stderr)
    yield
    sys.stdout, sys.stderr = before
