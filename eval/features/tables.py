"""Read tables of texts or of image paths that users give to a command, with values as they are written.

CSV and TSV have no types, so `007` is the text 007. In a TSV a quote is a character. What a table cannot say
clearly (a row of other length, a quote that is never closed, another encoding, a row without its value) is an
error with file and row: a list of texts that lost one would no longer be the user's.
"""

import contextlib
import csv
import io
import json
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core import store
from pipeline.core.files.foreign import foreign
from pipeline.core.records import InputError

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")
# Tables that are not read: as lines of text they would become nonsense.
_OTHER_TABLES = (".json", ".gz", ".xlsx", ".xls", ".arrow", ".feather", ".npy", ".zip")
_JSON_ENDINGS = (".jsonl", ".ndjson")


def read_texts(source: str, known: Sequence[str]) -> list[str]:
    """Read one text a line, or the column of a table that has one of the `known` names.

    Raises:
        InputError: if there is no text, no such column, or a row has no text.
    """
    if is_table(source):
        return read_strings(source, find_column(source, known, "texts"))
    if source.lower().endswith(_OTHER_TABLES):
        raise InputError(
            f"{source}: not a table that cnclip reads ({', '.join(TABLE_ENDINGS)}), nor lines of text"
        )
    with _lines(source) as lines:
        texts = [line.removesuffix("\n").removesuffix("\r") for line in lines]
    if not texts:
        raise InputError(f"{source}: no text in it; give one text a line")
    return texts


def is_table(source: str) -> bool:
    """Return whether this is a table, by its name."""
    return source.lower().endswith(TABLE_ENDINGS)


def find_column(source: str, known: Sequence[str], what: str) -> str:
    """Return the first of the known columns that a table has.

    Raises:
        InputError: if it has none of them; it lists those that are there.
    """
    names = column_names(source)
    for name in known:
        if name in names:
            return name
    raise InputError(f"{source}: no column of {what} ({', '.join(known)}); it has {', '.join(names)[:300]}")


def column_names(source: str) -> list[str]:
    """Return the columns of a table: its header, or the keys of its first JSON line."""
    if source.lower().endswith(".parquet"):
        return [str(name) for name in parquet_schema(source).names]
    if source.lower().endswith(_JSON_ENDINGS):
        with contextlib.closing(_records(source)) as records:
            return list(next(records, (0, {}))[1])
    with contextlib.closing(_rows(source)) as rows:
        return next(rows)[1]


def read_strings(source: str, column: str) -> list[str]:
    """Read one column of a table as text.

    Raises:
        InputError: if the table is empty, or a row has no text in this column; it names the row.
    """
    if source.lower().endswith(".parquet"):
        values = _parquet_strings(source, column)
    elif source.lower().endswith(_JSON_ENDINGS):
        values = [_json_string(source, number, record, column) for number, record in _records(source)]
    else:
        rows = _rows(source)
        at = next(rows)[1].index(column)
        values = [row[at] for _, row in rows]
    if not values:
        raise InputError(f"{source}: holds no rows; give at least one")
    return values


def parquet_schema(source: str) -> "pa.Schema":
    """Return the schema of a Parquet file.

    Raises:
        InputError: if it cannot be read.
    """
    import pyarrow.parquet as pq

    with reading_parquet(source), store.open_read(source) as file:
        return pq.read_schema(file)


@contextlib.contextmanager
def reading_parquet(source: str) -> Iterator[None]:
    """Turn what pyarrow or polars raises for a file that is damaged or missing into an InputError."""
    with foreign(source, "table", "write it again"):
        store.refuse_special(source)
        yield


def _parquet_strings(source: str, column: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading_parquet(source):
        with store.open_read(source) as file:
            values = pq.read_table(file, columns=[column]).column(0)
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise InputError(f"{source}: column {column} holds {kind}, not text; write it as strings")
        found = values.to_pylist()
    if values.null_count:
        raise InputError(
            f"{source}: row {found.index(None)}: column {column} is null, as in {values.null_count} of"
            f" {len(found)} rows; leave them out or fill them in"
        )
    return [str(value) for value in found]


def _records(source: str) -> Generator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of JSON lines."""
    with _lines(source) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = str(error) or "too deep"
                raise InputError(f"{source}:{number}: not a line of JSON ({reason}); correct it") from None
            if not isinstance(record, dict):
                raise InputError(
                    f"{source}:{number}: expected an object with keys, found {line.strip()[:60]!r}"
                )
            yield number, record


def _json_string(source: str, number: int, record: dict[str, Any], column: str) -> str:
    if column not in record:
        raise InputError(
            f"{source}:{number}: has no {column!r}; it has {', '.join(record)[:200] or 'no keys'}"
            f": every line needs the key that the first one has"
        )
    value = record[column]
    if not isinstance(value, str):
        shown = json.dumps(value, ensure_ascii=False)[:60]
        raise InputError(f"{source}:{number}: {column!r} is {shown}, not text; write it in quotes")
    return value


def _rows(source: str) -> Generator[tuple[int, list[str]]]:
    """Yield (line number, fields) of a CSV or TSV, its header first."""
    is_tsv = source.lower().endswith(".tsv")
    names: list[str] | None = None
    blank: list[int] = []  # lines: of one column they are empty texts, unless they end the file
    with _lines(source) as lines:
        if is_tsv:
            parsed: Iterator[list[str]] = (
                line.rstrip("\r\n").split("\t") if line.strip("\r\n") else [] for line in lines
            )
        else:
            parsed = csv.reader(lines, strict=True)
        number = 0
        while True:
            try:
                fields = next(parsed)
            except StopIteration:
                break
            except csv.Error as error:
                raise InputError(
                    f"{source}: after line {number}: {error}: correct the quotes there"
                ) from None
            number = number + 1 if is_tsv else parsed.line_num  # type: ignore[attr-defined]
            if names is None:
                names = [name.strip() for name in fields]
                if twice := [name for name, count in Counter(names).items() if count > 1]:
                    raise InputError(
                        f"{source}: its header names {twice[0]!r} twice; rename one of the columns"
                    )
                yield number, names
                continue
            if not fields:
                blank.append(number)
                continue
            if len(fields) != len(names):
                raise InputError(
                    f"{source}:{number}: {len(fields)} fields, but the header has {len(names)}"
                    f" ({', '.join(names)[:100]}); correct the row"
                )
            if len(names) == 1:
                yield from ((line, [""]) for line in blank)
            blank.clear()
            yield number, fields
    if names is None:
        raise InputError(f"{source}: is empty; give a table with a header")


@contextlib.contextmanager
def _lines(source: str) -> Iterator[Iterator[str]]:
    """Open a text file for reading line by line, without a byte-order mark.

    Raises:
        InputError: if it is not UTF-8.
    """
    try:
        with store.open_read(source) as file:
            yield iter(io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n"))
    except FileNotFoundError:
        raise InputError(f"{source}: no such file or folder") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror or error}") from None
