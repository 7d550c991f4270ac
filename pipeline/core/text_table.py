"""Aligns plain text in columns, with one rule for the width of a character."""

import unicodedata
from collections.abc import Sequence

from pipeline.core.terminal import one_line

_TAKE_NO_ROOM = ("Mn", "Me", "Cf")  # combining marks, enclosing marks, and format characters such as joiners


def align(rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """Return rows as lines of columns, two spaces apart; `numeric` columns are right-aligned."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(display_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [pad(*item) for item in zip(row, widths, numeric, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def pad(text: str, width: int, numeric: bool = False) -> str:
    """Return the text padded to `width` columns with spaces after it, or before it if `numeric`."""
    spaces = " " * (width - display_width(text))
    return spaces + text if numeric else text + spaces


def display_width(text: str) -> int:
    """Return the terminal columns of a text: a wide character (CJK) takes 2, a combining mark 0."""
    if text.isascii():
        return len(text)
    return sum(map(_width, text))


def _width(character: str) -> int:
    if unicodedata.category(character) in _TAKE_NO_ROOM:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
