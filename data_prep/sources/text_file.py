"""Caption tables that are text (CSV, TSV, JSON lines): read leniently, every malformed row counted.

A web-scale CSV holds rows that no parser likes: too many fields, quotes that never close, bytes that are no
UTF-8. Such a row is set aside with its reason, the others are kept; Wukong's captions with commas, quotes
and newlines in them are ordinary rows (RFC 4180).
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import polars as pl
import pyarrow as pa
import pyarrow.csv

from pipeline.core import store
from pipeline.core.files.columns import column
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import DropReason, InputError

MALFORMED_COLUMNS = DropReason("malformed:columns")  # more or fewer fields than the header has
MALFORMED_ENCODING = DropReason("malformed:encoding")  # not UTF-8, or text that was damaged before (U+FFFD)
MALFORMED_QUOTE = DropReason("malformed:quote")  # a quote that is never closed: other rows end up inside it
MALFORMED_JSON = DropReason("malformed:json")  # not one JSON object

BLOCK_BYTES = 16 << 20  # read at once; also the longest row
_SHOWN_CHARACTERS = 300  # of a malformed row, in the table of malformed rows
_REPLACEMENT = "\ufffd"
# A line that begins a row of its own inside a field's value: an address as one of the comma's fields.
_ADDRESS = r"https?://"
_SET_ASIDE_AT_ONCE = 1000  # malformed rows, where no batch takes them along
_SEEN_LINES = 1000  # of JSON lines, to learn the columns


@dataclass(frozen=True, slots=True)
class Malformed:
    """A row that was set aside."""

    reason: str
    text: str  # its beginning


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows of a text file: all columns as strings, and what was set aside among them."""

    rows: pl.DataFrame
    malformed: list[Malformed]


def is_text(path: str) -> bool:
    """Return whether this module reads a table, by its name."""
    return _plain_name(path).endswith((".csv", ".tsv", ".jsonl", ".ndjson"))


def column_names(path: str) -> list[str]:
    """Return a text table's columns: its header, or the first JSON lines' keys in order of appearance.

    InputError if the file is empty or its beginning cannot be read.
    """
    with _open_utf8(path) as file:
        if not _plain_name(path).endswith((".jsonl", ".ndjson")):
            header = file.read(1 << 16).decode("utf-8", "replace").split("\n", 1)[0]
            try:
                names = next(csv.reader([header], delimiter=_separator(path)), [])
            except csv.Error as error:
                raise _unreadable(path, error) from None
            if not names:
                raise InputError(f"{path}: cannot be read as a table: it is empty; replace the file")
            names = [name.strip() for name in names]
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise InputError(
                    f"{path}: its header names {twice[0][:80]!r} twice; rename one of the columns"
                )
            return names
        found: dict[str, None] = {}
        for line in file.read(BLOCK_BYTES).decode("utf-8", "replace").split("\n")[:_SEEN_LINES]:
            try:
                row = parse_json(line, keep_surrogates=True)
            except ValueError:
                continue
            if isinstance(row, dict):
                found |= dict.fromkeys(row)
    if not found:
        raise InputError(
            f"{path}: cannot be read as a table: no JSON object in its first lines; write one object a line"
        )
    return list(found)


def read_batches(
    path: str, columns: Sequence[str], set_aside: Callable[[list[Malformed]], None] | None = None
) -> Iterator[RowBatch]:
    """Read a text table in batches of bounded size; `columns` must be among `column_names`.

    Malformed rows come with the batches. A stretch of a CSV without a single good row has no batch:
    `set_aside` is given its rows as they come, so that memory stays that of a block.
    """
    if _plain_name(path).endswith((".jsonl", ".ndjson")):
        batches = _json_batches(path, columns)
    else:
        batches = _csv_batches(path, columns, set_aside)
    for batch in batches:
        damaged = pl.any_horizontal(
            column(name).str.contains(_REPLACEMENT, literal=True).fill_null(False) for name in columns
        )
        marked = batch.rows.with_columns(_damaged=damaged)
        rows = marked.filter(~pl.col("_damaged")).drop("_damaged")
        bad = marked.filter("_damaged").select(
            pl.concat_str(map(column, columns), separator=" ", ignore_nulls=True)
        )
        malformed = [Malformed(MALFORMED_ENCODING, text[:_SHOWN_CHARACTERS]) for text in bad.to_series()]
        yield RowBatch(rows, batch.malformed + malformed)


def _csv_batches(
    path: str, columns: Sequence[str], set_aside: Callable[[list[Malformed]], None] | None
) -> Iterator[RowBatch]:
    names = column_names(path)
    separator = _separator(path)
    # Of the rows that the parser refused since the last batch: what is malformed, and what is not by itself.
    refused: list[Malformed] = []
    rescued: list[tuple[str, ...]] = []

    def keep_aside(row: Any) -> str:
        more, found = _reparse(row.text.split("\n"), names, columns, separator)
        rescued.extend(more)
        refused.extend(found)
        if set_aside is not None and len(refused) >= _SET_ASIDE_AT_ONCE:
            set_aside(refused.copy())
            refused.clear()
        return "skip"

    with _open_utf8(path) as file:
        try:
            reader = pyarrow.csv.open_csv(
                file,
                read_options=pyarrow.csv.ReadOptions(
                    use_threads=False, block_size=BLOCK_BYTES, column_names=names, skip_rows=1
                ),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=separator, newlines_in_values=True, invalid_row_handler=keep_aside
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    include_columns=list(columns),
                    strings_can_be_null=False,
                ),
            )
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):
                return
            raise _unreadable(path, error) from None
        while True:
            try:
                block = reader.read_next_batch()
            except StopIteration:
                break
            except pa.ArrowInvalid as error:
                raise _unreadable(path, error) from None
            rows = pl.DataFrame(pl.from_arrow(block)).select(map(column, columns))
            rows, malformed, unswallowed = _unswallow(rows, names, columns, separator)
            malformed += refused
            unswallowed += rescued
            refused.clear()
            rescued.clear()
            if unswallowed:
                schema = dict.fromkeys(columns, pl.String)
                rows = pl.concat([rows, pl.DataFrame(unswallowed, schema=schema, orient="row")])
            # An empty field is no value: a row with an empty caption has no caption.
            yield RowBatch(rows.with_columns(pl.all().replace("", None)), malformed)
        if refused or rescued:  # the table ended without another good row
            rows = pl.DataFrame(rescued, schema=dict.fromkeys(columns, pl.String), orient="row")
            yield RowBatch(rows.with_columns(pl.all().replace("", None)), list(refused))


def _unswallow(
    rows: pl.DataFrame, names: Sequence[str], columns: Sequence[str], separator: str
) -> tuple[pl.DataFrame, list[Malformed], list[tuple[str, ...]]]:
    """Set aside rows whose quote was never closed and read again the rows that they swallowed.

    A value is suspected where one of its further lines holds an address; such a line is a row of its own
    where it has as many fields as the header.
    """
    inside = pl.any_horizontal(column(name).str.contains(rf"\n[^\n]*{_ADDRESS}") for name in columns)
    suspects = rows.with_row_index("_at").filter(inside)
    if suspects.is_empty():
        return rows, [], []
    swallowing, malformed, rescued = [], [], []
    for at, *values in suspects.iter_rows():
        text = separator.join(value or "" for value in values)
        first, *lines = text.split("\n")
        if lines[-1].endswith('"') and lines[-1].count('"') % 2:
            lines[-1] = lines[-1][:-1]  # its opening quote was taken for the end of the one never closed
        more, found = _reparse(lines, names, columns, separator)
        if more:
            swallowing.append(at)
            malformed.append(Malformed(MALFORMED_QUOTE, first[:_SHOWN_CHARACTERS]))
            # What is left over is the end of the value that swallowed: part of the row already counted.
            malformed += [item for item in found if re.search(_ADDRESS, item.text)]
            rescued += more
    kept = rows.with_row_index("_at").filter(~pl.col("_at").is_in(swallowing)).drop("_at")
    return kept, malformed, rescued


def _reparse(
    lines: Sequence[str], names: Sequence[str], columns: Sequence[str], separator: str
) -> tuple[list[tuple[str, ...]], list[Malformed]]:
    """Read lines one by one, as rows of a table without newlines in values."""
    wanted = [names.index(name) for name in columns]
    rows, malformed = [], []
    for line in lines:
        line = line.rstrip("\r")
        if not line:
            continue
        try:
            fields = next(csv.reader([line], delimiter=separator, strict=True))
        except (csv.Error, StopIteration):
            malformed.append(Malformed(MALFORMED_QUOTE, line[:_SHOWN_CHARACTERS]))
            continue
        if len(fields) == len(names) and (len(lines) == 1 or re.search(_ADDRESS, line)):
            rows.append(tuple(fields[at] for at in wanted))
        else:
            malformed.append(Malformed(MALFORMED_COLUMNS, line[:_SHOWN_CHARACTERS]))
    return rows, malformed


def _json_batches(path: str, columns: Sequence[str]) -> Iterator[RowBatch]:
    with _open_utf8(path) as file:
        rest = b""
        while True:
            block = file.read(BLOCK_BYTES)
            lines = (rest + block).split(b"\n")
            # Without the last line, which the next block completes.
            rest = lines.pop() if block else b""
            text = pl.DataFrame({"line": [line.decode("utf-8", "replace") for line in lines]})
            text = text.with_columns(pl.col("line").str.strip_chars()).filter(pl.col("line") != "")
            # Rust reads the JSON once a column; a line that is no JSON gives null.
            whole = pl.col("line").str.json_path_match("$")
            is_row = whole.is_not_null() & pl.col("line").str.starts_with("{")
            values = [
                pl.col("line").str.json_path_match(f"$[{json.dumps(name, ensure_ascii=False)}]").alias(name)
                for name in columns
            ]
            read = text.select(*values, _line="line", _is_row=is_row)
            bad = read.filter(~pl.col("_is_row"))["_line"]
            yield RowBatch(
                read.filter("_is_row").select(map(column, columns)),
                [Malformed(MALFORMED_JSON, line[:_SHOWN_CHARACTERS]) for line in bad],
            )
            if not block:
                return


class _Utf8:
    """A binary file whose bytes are read as UTF-8: what is none becomes U+FFFD, a byte-order mark goes.

    Parsers stop at the first wrong byte of a block; this way only the row it stands in is lost.
    """

    def __init__(self, file: IO[Any], path: str) -> None:
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._left = b""
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        parts, length = [self._left], len(self._left)
        while size < 0 or length < size:
            try:
                raw = self._file.read(BLOCK_BYTES if size < 0 else max(size - length, 1))
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise _unreadable(self._path, error) from None
            parts.append(self._decoder.decode(raw, final=not raw).encode("utf-8"))
            length += len(parts[-1])
            if not raw:
                break
        data = b"".join(parts)
        end = len(data) if size < 0 else size
        self._left = data[end:]
        return data[:end]

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def __enter__(self) -> "_Utf8":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_utf8(path: str) -> _Utf8:
    file = store.open_read(path)
    return _Utf8(gzip.GzipFile(fileobj=file) if path.lower().endswith(".gz") else file, path)  # type: ignore[arg-type]


def _unreadable(path: str, error: Exception) -> InputError:
    text = str(error).splitlines()[0]
    if "straddling" in text:
        text = f"a row is longer than {BLOCK_BYTES >> 20} MiB, most likely a quote that is never closed"
    return InputError(f"{path}: cannot be read as a table: {text}; repair or replace the file")


def _plain_name(path: str) -> str:
    return path.lower().removesuffix(".gz")


def _separator(path: str) -> str:
    return "\t" if _plain_name(path).endswith(".tsv") else ","
