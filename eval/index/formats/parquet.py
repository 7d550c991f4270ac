"""Reads a Parquet column of lists of numbers as a matrix, row groups at a time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.index.formats.matrix import MOST_WIDTH, PARQUET, Matrix, file_of
from pipeline.core.arrays import Int64Array
from pipeline.core.files.foreign import foreign
from pipeline.core.records import InputError

_WHAT, _REMEDY = "Parquet file", "write it again"
_BATCH_ROWS = 16_384


def open_parquet(path: str) -> Matrix:
    """Find the column: that after the colon in `FILE.parquet:COLUMN`, or the only one of lists of numbers.

    Raises:
        InputError: if there is none, there are several, or its rows have no one width.
    """
    import pyarrow.parquet as pq

    name = file_of(path)
    with foreign(name, _WHAT, _REMEDY), pq.ParquetFile(name) as file:
        lists = {field.name: field.type for field in file.schema_arrow if _is_vectors(field.type)}
        asked = "" if path.endswith(PARQUET) else path[len(name) + 1 :]
        column = asked or (next(iter(lists)) if len(lists) == 1 else "")
        if column not in lists:
            what = f"no column {asked!r} of lists of numbers" if asked else f"{len(lists)} such columns"
            raise InputError(
                f"{name}: {what}; give {name}:COLUMN with one of"
                f" {', '.join(lists) or 'none: no column has lists of numbers'}"
            )
        num_rows = file.metadata.num_rows
        first = next(file.iter_batches(batch_size=1, columns=[column]), None)
        width = 0 if first is None or first.column(0)[0].as_py() is None else len(first.column(0)[0].as_py())
        if not num_rows or not 0 < width <= MOST_WIDTH:
            raise InputError(f"{name}: column {column!r} has {num_rows} rows, the first of width {width}")
        dtype = np.dtype(lists[column].value_type.to_pandas_dtype())
        ends = np.cumsum([file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)])
    return _Column(name, column, (num_rows, width), dtype, ends.astype(np.int64))


@dataclass(frozen=True, slots=True)
class _Column:
    path: str
    column: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    ends_G: Int64Array  # row after each row group

    def block(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self.rows(np.arange(start, stop))

    def rows(self, wanted: Int64Array) -> npt.NDArray[Any]:
        import pyarrow.parquet as pq

        parts = [np.zeros((0, self.shape[1]), self.dtype)]
        groups = np.unique(np.searchsorted(self.ends_G, wanted, side="right")).tolist()
        with foreign(self.path, _WHAT, _REMEDY), pq.ParquetFile(self.path) as file:
            for group in groups:
                row = int(self.ends_G[group - 1]) if group else 0
                batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=[self.column])
                for batch in batches:
                    low, high = np.searchsorted(wanted, [row, row + len(batch)])
                    if low < high:
                        parts.append(self._vectors(batch.column(0), row)[wanted[low:high] - row])
                    row += len(batch)
        return np.concatenate(parts)

    def _vectors(self, lists: Any, first_row: int) -> npt.NDArray[Any]:
        width_N = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(width_N != self.shape[1])
        if len(wrong):
            raise InputError(
                f"{self.path}: column {self.column!r} has {width_N[wrong[0]]} numbers in row"
                f" {first_row + wrong[0]}, {self.shape[1]} in the first: {_REMEDY}"
            )
        flat = lists.flatten()
        if flat.null_count:
            raise InputError(
                f"{self.path}: column {self.column!r} has empty numbers near row {first_row}: {_REMEDY}"
            )
        return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(-1, self.shape[1])


def _is_vectors(kind: Any) -> bool:
    import pyarrow as pa

    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))
