"""Plain text in columns, also with Chinese in them."""

import unicodedata
from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """Rows as aligned columns, two spaces apart; a Chinese character is two columns wide."""
    widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            " " * (width - _width(cell)) + cell if right else cell + " " * (width - _width(cell))
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
