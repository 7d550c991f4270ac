"""Parquet and Arrow tables with images inside, batch by batch, and where an image's bytes lie in the file.

An uncompressed image lies in the file as it is: it is served from there. Memory is that of a batch.
"""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.readers.columns import type_of
from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.files.foreign import foreign

_ROWS_AT_ONCE = 64  # of Parquet: images of the largest size take 4 GiB
_BUFFER_BYTES = 1 << 20  # of a column; without one its whole chunk is read
_LENGTH_BYTES = 4  # before each value of Parquet's plain encoding
_KNOWN_BYTES = 256  # of an image that are looked for at once
_MOST_HEADER_BYTES = 1 << 16  # between the values of two pages
_ARROW_FILE = b"ARROW1"  # how the file format begins; `datasets` writes the streaming format
_REMEDY = "download or copy it again"


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of a table."""

    columns: pa.RecordBatch
    images: pa.Array  # binary, null where a row has none
    paths: pa.Array | None  # text: files that hold images, relative to the table's folder or not
    offset_bytes: Int64Array  # where each image begins in the file; -1 where it is not in it as it is


def read_schema(path: str) -> pa.Schema:
    """Return a table's columns. InputError if the file is damaged or of another kind."""
    store.refuse_special(path)
    with foreign(path, "table", _REMEDY):
        if path.endswith(".parquet"):
            return pq.read_schema(path)
        with pa.memory_map(path) as file:
            return _open_arrow(file.read_buffer()).schema


def read_batches(path: str, names: Sequence[str], image: str) -> Iterator[Batch]:
    """Yield a table's rows in order. InputError for damage."""
    batches = _parquet(path, names, image) if path.endswith(".parquet") else _arrow(path, image)
    while True:
        with foreign(path, "table", _REMEDY):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def values_of(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return a column, or a field of a struct, without a dictionary."""
    if name in batch.schema.names:
        values = batch.column(name)
    else:
        outer, _, inner = name.partition(".")
        values = values_of(pa.RecordBatch.from_struct_array(_whole(batch.column(outer))), inner)
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _whole(values: pa.Array) -> pa.Array:
    """Return a struct array whose nulls are those of its fields."""
    return pa.StructArray.from_arrays(values.flatten(), fields=list(values.type))


def _split(values: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """Return the bytes and the paths of a column of images."""
    if pa.types.is_struct(values.type):
        fields = {field.name: part for field, part in zip(values.type, values.flatten(), strict=True)}
        paths = fields.get("path")
        data = fields.get("bytes")
        return (pa.nulls(len(values), pa.binary()) if data is None else data), paths
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return pa.nulls(len(values), pa.binary()), values
    return values, None


def _arrow(path: str, image: str) -> Iterator[Batch]:
    with pa.memory_map(path) as file:
        whole = file.read_buffer()
        for batch in _arrow_batches(whole):
            images, paths = _split(values_of(batch, image))
            if pa.types.is_binary_view(images.type):
                images = images.cast(pa.large_binary())
            offset_bytes = _addresses(images) - whole.address
            # Compressed batches, and what was put together anew, lie elsewhere in memory.
            offset_bytes[(offset_bytes < 0) | (offset_bytes >= whole.size)] = -1
            yield Batch(batch, images, paths, offset_bytes)


def _open_arrow(data: pa.Buffer) -> Any:
    if data.size >= len(_ARROW_FILE) and bytes(data[: len(_ARROW_FILE)]) == _ARROW_FILE:
        return pa.ipc.open_file(pa.BufferReader(data))
    return pa.ipc.open_stream(pa.BufferReader(data))


def _arrow_batches(data: pa.Buffer) -> Iterator[pa.RecordBatch]:
    reader = _open_arrow(data)
    if isinstance(reader, pa.RecordBatchFileReader):
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        yield from reader


def _addresses(values: pa.Array) -> Int64Array:
    """Return where each value's bytes are in memory."""
    dtype = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    _, offsets, data = values.buffers()
    if offsets is None or data is None:  # all null or empty
        return np.full(len(values), -1, dtype=np.int64)
    starts = np.frombuffer(offsets, dtype)[values.offset : values.offset + len(values)]
    found: Int64Array = starts.astype(np.int64) + data.address
    return found


def _parquet(path: str, names: Sequence[str], image: str) -> Iterator[Batch]:
    file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    dtype = type_of(file.schema_arrow, image)
    leaf = f"{image}.bytes" if pa.types.is_struct(dtype) else image
    with open(path, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for group in range(file.num_row_groups):
            chunk = _Chunk(data, file.metadata.row_group(group), leaf)
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=list(names)):
                images, paths = _split(values_of(batch, image))
                yield Batch(batch, images, paths, chunk.places(images))


class _Chunk:
    """The values of a column in one row group, looked for in the file one after the other."""

    def __init__(self, data: mmap.mmap, group: Any, leaf: str) -> None:
        self._data, self._at, self._end = data, 0, 0
        for number in range(group.num_columns):
            column = group.column(number)
            if column.path_in_schema != leaf or column.has_dictionary_page:
                continue
            if column.compression == "UNCOMPRESSED" and "PLAIN" in column.encodings:
                self._at = column.data_page_offset
                self._end = self._at + column.total_compressed_size

    def places(self, images: pa.Array) -> Int64Array:
        """Return where the bytes of the column's next values are; -1 for those that do not lie there."""
        offset_bytes = np.full(len(images), -1, dtype=np.int64)
        if self._at < self._end:
            for row, image in enumerate(images):
                if image.is_valid:
                    offset_bytes[row] = self._next(image.as_py())
        return offset_bytes

    def _next(self, image: bytes) -> int:
        """Return where a value is: after the last one, or behind the header of the next page."""
        if self._at >= self._end or not len(image):
            return -1
        before = len(image).to_bytes(_LENGTH_BYTES, "little")
        start = before + image[:_KNOWN_BYTES]
        last = min(self._end, self._at + _MOST_HEADER_BYTES + len(start))
        at = self._data.find(start, self._at, last) + _LENGTH_BYTES
        if at < _LENGTH_BYTES or self._data[at : at + len(image)] != image:
            self._at = self._end  # another encoding: the rest of the column is copied
            return -1
        self._at = at + len(image)
        return at
