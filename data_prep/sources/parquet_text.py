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


def _rows(batch: pa.RecordBatch) -> pl.DataFrame:
    values = [_as_text(values) if _is_text(values.type) else values for values in batch.columns]
    found: Any = pl.from_arrow(pa.table(values, names=batch.schema.names))
    return pl.DataFrame(found)


def _is_text(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype))


def _as_text(values: pa.Array) -> pa.Array:
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        raw = (
            values.cast(pa.large_binary(), safe=False)
            if pa.types.is_large_string(values.type)
            else (values.cast(pa.binary(), safe=False))
        )
        cells = (cell.as_py() for cell in raw)
        text = [None if cell is None else cell.decode("utf-8", "replace") for cell in cells]
        return pa.array(text, pa.large_string())
    return values
