"""Reads JSON lines and JSON arrays: each object is a row, and a value that cannot be text becomes null."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from data_prep.sources.text_lines import BLOCK_BYTES, blocks_of, head_of, lines_of, too_long, unreadable
from data_prep.sources.text_rows import (
    BETWEEN,
    MALFORMED_JSON,
    ListCaptions,
    Malformed,
    RowBatch,
    TextLayout,
    malformed,
)
from pipeline.core.files.columns import column
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import InputError

_SEEN_ROWS = 1000  # to learn the columns
_ROWS_AT_ONCE = 10_000  # of an array
_SPACE = re.compile(r"[\s,]*")
_LINES = "write one object a line"


def is_array(path: str, layout: TextLayout) -> bool:
    """Return whether a file is one JSON array.

    Raises:
        InputError: if the whole file is a single object.
    """
    head = head_of(path, layout).lstrip()
    if not head.startswith("{"):
        return head.startswith("[") and not path.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    if path.lower().removesuffix(".gz").endswith(".json"):
        try:
            parse_json(head.split("\n", 1)[0], keep_surrogates=True)
        except ValueError:
            keys = ", ".join(dict.fromkeys(re.findall(r'^[ \t]{0,4}"([^"]{1,40})"\s*:', head, re.MULTILINE)))
            raise InputError(
                f"{path}: one JSON object over several lines{f' with {keys[:200]}' if keys else ''};"
                f" {_LINES}, or an array of objects"
            ) from None
    return False


def json_columns(path: str, layout: TextLayout) -> list[str]:
    """Return the keys of the first rows in order of appearance.

    Raises:
        InputError: if the first rows have no keys.
    """
    found: dict[str, None] = {}
    if is_array(path, layout):
        for number, row in enumerate(_items(path, layout)):
            if isinstance(row, dict):
                found |= dict.fromkeys(row)
            if number >= _SEEN_ROWS:
                break
    else:
        for line in head_of(path, layout).split("\n")[:_SEEN_ROWS]:
            try:
                row = parse_json(line, keep_surrogates=True)
            except ValueError:
                continue
            if isinstance(row, dict):
                found |= dict.fromkeys(row)
    if not found:
        raise InputError(f"{path}: cannot be read as a table: no JSON object in its first lines; {_LINES}")
    return list(found)


def read_json(path: str, columns: Sequence[str], layout: TextLayout) -> Iterator[RowBatch]:
    """Read rows in batches, all values as text: numbers and lists as JSON writes them."""
    if is_array(path, layout):
        yield from _array_batches(path, columns, layout)
        return
    for lines in lines_of(path, layout):
        text = pl.DataFrame({"line": lines}, schema={"line": pl.String}).with_row_index("at")
        text = text.with_columns(pl.col("line").str.strip_chars()).filter(pl.col("line") != "")
        # Polars parses the JSON once per column; a line that is not JSON gives null.
        whole = pl.col("line").str.json_path_match("$")
        values = [
            pl.col("line")
            .str.json_path_match(f"$[{json.dumps(name, ensure_ascii=False)}]")
            .alias(f"_{number}")
            for number, name in enumerate(columns)
        ]
        read = text.select(
            "at", "line", *values, _is_row=whole.is_not_null() & pl.col("line").str.starts_with("{")
        )
        # Plain text may also begin with a bracket; only the original line shows what such a value is.
        nested = [
            pl.col(f"_{number}").str.contains(r"^\s*[\[{]").fill_null(False)
            for number, name in enumerate(columns)
            if name in (layout.url, layout.caption)
        ]
        slow = ~pl.col("_is_row")
        if nested:
            slow |= pl.any_horizontal(nested)
        one_by_one = read.filter(slow).select("at", "line")
        rows, found = _read_lines(path, one_by_one, columns, layout)
        fast = read.filter(~slow).select("at", *(f"_{number}" for number in range(len(columns))))
        fast.columns = ["at", *columns]
        schema: dict[str, Any] = {"at": fast.schema["at"], **dict.fromkeys(columns, pl.String)}
        both = pl.concat([fast, pl.DataFrame(rows, schema=schema, orient="row")])
        yield RowBatch(both.sort("at", maintain_order=True).select(map(column, columns)), found)


def _read_lines(
    path: str, lines: pl.DataFrame, columns: Sequence[str], layout: TextLayout
) -> tuple[list[tuple[Any, ...]], list[Malformed]]:
    """Read lines that the fast reader refuses (NaN, half a surrogate pair) or that hold lists."""
    rows, found = list[tuple[Any, ...]](), list[Malformed]()
    for at, line in lines.iter_rows():
        try:
            row = parse_json(line, keep_surrogates=True)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows += [(at, *values) for values in _unfolded(path, row, columns, layout)]
        else:
            found.append(malformed(MALFORMED_JSON, line))
    return rows, found


def _array_batches(path: str, columns: Sequence[str], layout: TextLayout) -> Iterator[RowBatch]:
    rows, found = list[list[str | None]](), list[Malformed]()
    schema = dict.fromkeys(columns, pl.String)
    for item in _items(path, layout):
        if isinstance(item, dict):
            rows += _unfolded(path, item, columns, layout)
        else:
            found.append(malformed(MALFORMED_JSON, json.dumps(item, ensure_ascii=True)))
        if len(rows) + len(found) >= _ROWS_AT_ONCE:
            yield RowBatch(pl.DataFrame(rows, schema=schema, orient="row"), found)
            rows, found = [], []
    yield RowBatch(pl.DataFrame(rows, schema=schema, orient="row"), found)


def _items(path: str, layout: TextLayout) -> Iterator[Any]:
    """Yield the items of an array.

    Raises:
        InputError: if the array is damaged, since reading cannot resume after the damage.
    """
    decoder, buffer, at, is_open, seen = json.JSONDecoder(), "", 0, False, 0
    pieces = blocks_of(path, layout)
    while True:
        piece = next(pieces, None)
        buffer, at = buffer[at:] + (piece or ""), 0
        while True:
            at = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]
            if not is_open and at < len(buffer):
                at, is_open = at + 1, True  # the bracket
                continue
            if buffer.startswith("]", at):
                return
            if at >= len(buffer):
                break
            try:
                item, end = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError):
                if piece is not None and len(buffer) - at <= BLOCK_BYTES:
                    break  # it may end in the next piece
                if piece is not None:
                    raise too_long(path) from None
                raise unreadable(path, f"its JSON array is damaged after {seen} items") from None
            if end == len(buffer) and piece is not None:
                break  # a number may have more digits
            yield item
            at, seen = end, seen + 1
        if piece is None:
            raise unreadable(path, f"its JSON array is cut off after {seen} items")


def _unfolded(
    path: str, row: Mapping[str, Any], columns: Sequence[str], layout: TextLayout
) -> list[list[str | None]]:
    """Return the rows of an object: one, or one per caption in its list."""
    if isinstance(address := row.get(layout.url or ""), list | dict):
        raise refuse_nested(path, str(layout.url), "address", address)
    captions: list[Any] = [None]
    if layout.caption is not None and isinstance(value := row.get(layout.caption), list | dict):
        if isinstance(value, dict) or any(isinstance(item, list | dict) for item in value):
            raise refuse_nested(path, layout.caption, "caption", value)
        if layout.list_captions is None:
            raise refuse_list(path, layout.caption)
        captions = chosen_captions(value, layout.list_captions)
        return [
            [as_text(caption if name == layout.caption else row.get(name)) for name in columns]
            for caption in captions
        ]
    return [[as_text(row.get(name)) for name in columns]]


def chosen_captions(items: Sequence[Any], list_captions: ListCaptions | None) -> list[str | None]:
    """Return the captions of a list as rows: each, the first, or all of them in one text."""
    if list_captions == "random":
        texts = [text for item in items if (text := as_text(item)) is not None]
        return [BETWEEN.join(texts) if texts else None]
    return [as_text(item) for item in (items if list_captions == "each" else items[:1])] or [None]


def refuse_list(path: str, name: str) -> InputError:
    """Return the error for lists of captions, if the source does not say what they become."""
    return InputError(
        f'{path}: column {name!r} holds lists of captions; set list_captions = "each" (a row for each'
        ' caption), "first" or "random" in its source'
    )


def refuse_nested(path: str, name: str, what: str, value: Any) -> InputError:
    """Return the error for a list or an object where text belongs; it names the object's fields."""
    first = (
        next((item for item in value if isinstance(item, dict)), None) if isinstance(value, list) else value
    )
    kind = "objects" if isinstance(value, dict) else "lists of objects" if first is not None else "lists"
    fields = f" with {', '.join(map(str, first))[:200]}" if first else ""
    return InputError(
        f"{path}: column {name!r} holds {kind}{fields}, not one {what} as text; name another column, or write"
        f" the {what} as a separate column"
    )


def as_text(value: Any) -> str | None:
    """Return a JSON value as text; NaN becomes null, and unpaired surrogates are dropped."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
