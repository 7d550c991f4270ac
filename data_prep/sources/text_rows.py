"""What readers of text tables share: the table's layout, batches of rows, and malformed rows."""

import codecs
from dataclasses import dataclass
from typing import Literal

import polars as pl

from pipeline.core.records import DropReason

MALFORMED_COLUMNS = DropReason("malformed:columns")  # more or fewer fields than the header has
MALFORMED_ENCODING = DropReason("malformed:encoding")  # invalid in its encoding, or damaged earlier (U+FFFD)
MALFORMED_QUOTE = DropReason("malformed:quote")  # a quote that is never closed
MALFORMED_HEADER = DropReason("malformed:header")  # the header again, inside the table
MALFORMED_JSON = DropReason("malformed:json")  # not one JSON object

SHOWN_CHARACTERS = 300  # of a malformed row, in the table of malformed rows

ListCaptions = Literal["each", "first", "random"]
# Between the captions of one row, where a table has them as one text: a control character (record separator).
BETWEEN = "\x1e"


@dataclass(frozen=True, slots=True)
class Malformed:
    """A row that was set aside."""

    reason: str
    text: str  # its beginning


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows of a text file with all columns as strings, and the malformed rows among them."""

    rows: pl.DataFrame
    malformed: list[Malformed]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLayout:
    """How a source says a text table is written; unset fields follow from its name and beginning."""

    separator: str | None = None
    quote: str | None = None  # "": quotes are literal
    escape: str | None = None  # "": a quote inside quotes is doubled
    encoding: str | None = None
    header: bool | None = None  # False: columns are called 1, 2, 3
    list_captions: ListCaptions | None = None
    # Columns that hold addresses and captions: neither may be a list or an object.
    url: str | None = None
    caption: str | None = None
    addresses: bool = True  # whether the column of addresses holds URLs, not paths
    image_folder: str | None = None  # of a .txt: its images


def check_encoding(name: str) -> None:
    """Raise ValueError for an encoding of text that Python does not know."""
    try:
        is_text = codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        is_text = False
    if not is_text:
        raise ValueError(f"encoding {name!r} is not known; known are utf-16, gb18030, big5 …")


def malformed(reason: DropReason, text: str) -> Malformed:
    """Return a row that was set aside, with its beginning."""
    return Malformed(reason, text[:SHOWN_CHARACTERS])
