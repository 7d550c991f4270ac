"""Reads text caption tables (CSV, TSV, JSON, plain lines) leniently and counts every malformed row.

A web-scale CSV holds rows that parsers reject: too many fields, quotes that never close, bytes that are not
UTF-8. The reader sets such a row aside with its reason and keeps the others. Wukong's captions that contain
commas, quotes and newlines are ordinary rows (RFC 4180).
"""

import os
import re
from collections.abc import Iterator, Sequence

import polars as pl

from data_prep.sources.delimited import column_names_of, read_delimited
from data_prep.sources.json_rows import json_columns, read_json
from data_prep.sources.text_lines import lines_of, plain_name
from data_prep.sources.text_rows import MALFORMED_ENCODING, RowBatch, TextLayout, malformed
from pipeline.core.files.columns import column
from pipeline.core.records import InputError

DELIMITED = (".csv", ".tsv")
JSON = (".json", ".jsonl", ".ndjson")
PLAIN = (".txt",)
_REPLACEMENT = "\ufffd"
_IMAGES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".jxl",
    ".jp2",
)


def is_text(path: str) -> bool:
    """Return whether this module reads a table with this name."""
    return plain_name(path).endswith((*DELIMITED, *JSON, *PLAIN))


def column_names(path: str, layout: TextLayout | None = None) -> list[str]:
    """Return a text table's columns: its header, or the first JSON rows' keys in order of appearance.

    Raises:
        InputError: if the file is empty or its beginning cannot be read.
    """
    layout = layout or TextLayout()
    name = plain_name(path)
    if name.endswith(PLAIN):
        return ["url", "caption"]
    return json_columns(path, layout) if name.endswith(JSON) else column_names_of(path, layout)


def read_batches(path: str, columns: Sequence[str], layout: TextLayout | None = None) -> Iterator[RowBatch]:
    """Read a text table in batches of bounded size; `columns` must be among `column_names`.

    Each batch also holds its malformed rows.
    """
    layout = layout or TextLayout()
    name = plain_name(path)
    if name.endswith(PLAIN):
        batches = _line_batches(path, columns, layout)
    elif name.endswith(JSON):
        batches = read_json(path, columns, layout)
    else:
        batches = read_delimited(path, columns, layout)
    for batch in batches:
        whole = without_damaged(batch.rows, columns)
        yield RowBatch(whole.rows, batch.malformed + whole.malformed)


def is_damaged(columns: Sequence[str]) -> pl.Expr:
    """Return which rows have text that was already damaged, or is not in the declared encoding."""
    return pl.any_horizontal(
        pl.lit(False),
        *(column(name).str.contains(_REPLACEMENT, literal=True).fill_null(False) for name in columns),
    )


def without_damaged(rows: pl.DataFrame, columns: Sequence[str]) -> RowBatch:
    """Set aside the rows whose text is damaged."""
    damaged = rows.select(is_damaged(columns)).to_series()
    if damaged.len() == 1 != rows.height:
        damaged = pl.repeat(damaged.item(), rows.height, eager=True)
    bad = rows.filter(damaged).select(
        pl.concat_str(map(column, columns), separator=" ", ignore_nulls=True).alias("text")
    )
    found = [malformed(MALFORMED_ENCODING, text) for text in bad.to_series()]
    return RowBatch(rows.filter(~damaged), found)


def _line_batches(path: str, columns: Sequence[str], layout: TextLayout) -> Iterator[RowBatch]:
    """Read one caption per line and pair the lines with the folder's images in order of their names."""
    if layout.image_folder is None:
        raise InputError(
            f"{path}: one caption a line has no address; set picture_folder to the folder of its images, or"
            " give a .csv, .tsv or .jsonl with a column of addresses"
        )
    images = _images_in_order(layout.image_folder)
    count, last = 0, ""
    for lines in lines_of(path, layout):
        count, last = count + len(lines), lines[-1]
    count -= not last  # nothing follows the last line end
    if count != len(images):
        raise InputError(
            f"{path}: {count} captions, one per line, for {len(images)} images in {layout.image_folder};"
            " give as many, or a .csv with the path of each image"
        )
    first = 0
    for lines in lines_of(path, layout):
        lines = lines[: count - first]
        table = pl.DataFrame(
            {"url": images[first : first + len(lines)], "caption": [line.rstrip("\r") for line in lines]},
            schema={"url": pl.String, "caption": pl.String},
        )
        first += len(lines)
        yield RowBatch(table.select(map(column, columns)).with_columns(pl.all().replace("", None)), [])


def _images_in_order(folder: str) -> list[str]:
    """Return the paths of the images below a folder in natural order: 2.jpg before 10.jpg."""
    found = [
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(_IMAGES) and not name.startswith(".")
    ]
    return sorted(found, key=lambda path: [(part.zfill(20), part) for part in re.split(r"(\d+)", path)])
