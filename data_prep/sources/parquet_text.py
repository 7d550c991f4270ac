"""Reads Parquet files with text that is not UTF-8: a bad cell costs its row, not the file."""

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import store
from pipeline.core.files.columns import column
from pipeline.core.files.foreign import foreign

_REMEDY = "replace the file"


def has_bad_text(path: str, frame: pl.LazyFrame, columns: Sequence[str]) -> bool:
    """Return whether a file's text columns hold bytes that are not UTF-8; this reads the columns."""
    schema = frame.collect_schema()
    text = [name for name in columns if schema[name] == pl.String]
    if not text:
        return False
    lengths = [column(name).str.len_bytes().sum().alias(str(number)) for number, name in enumerate(text)]
    try:
        frame.select(lengths).collect(engine="streaming")
    except pl.exceptions.ComputeError as error:
        if "invalid utf" in str(error).lower().replace("-", ""):
            return True
        raise
    return False


def read_text_safely(path: str, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Yield a file's rows in order; bytes that are not UTF-8 become U+FFFD.

    Raises:
        InputError: if the file is damaged in another way.
    """
    with store.open_read(path) as file:
        with foreign(path, "table", _REMEDY):
            batches = pq.ParquetFile(file).iter_batches(columns=list(columns))
        while True:
            with foreign(path, "table", _REMEDY):
                batch = next(batches, None)
                rows = None if batch is None else _rows(batch)
            if rows is None:
                return
            yield rows


def as_text(values: pa.Array) -> pa.Array:
    """Return text, or lists of text, with U+FFFD for bytes that are not UTF-8; other columns as they are."""
    is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    if not _is_text(values.type.value_type if is_list else values.type):
        return values
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        plain = pa.large_list(pa.large_binary()) if is_list else pa.large_binary()
        cells = (cell.as_py() for cell in values.cast(plain, safe=False))
        if is_list:
            lists = [None if cell is None else [_decoded(item) for item in cell] for cell in cells]
            return pa.array(lists, pa.large_list(pa.large_string()))
        return pa.array([_decoded(cell) for cell in cells], pa.large_string())
    return values


def _rows(batch: pa.RecordBatch) -> pl.DataFrame:
    found: Any = pl.from_arrow(
        pa.table([as_text(values) for values in batch.columns], names=batch.schema.names)
    )
    return pl.DataFrame(found)


def _is_text(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype))


def _decoded(cell: bytes | None) -> str | None:
    return None if cell is None else cell.decode("utf-8", "replace")
