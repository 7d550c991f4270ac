"""Publishing tables as Parquet, and what their footers tell."""

import polars as pl
import pyarrow.parquet as pq

from pipeline.core import store
from pipeline.core.files.written import check_parquet, naming

ROWS_PER_GROUP = 65_536
_NUMBERS = ("INT32", "INT64", "FLOAT", "DOUBLE")


def write_table(frame: pl.DataFrame, path: str, rows_per_group: int = ROWS_PER_GROUP) -> str:
    """Publish a table as Parquet and return its sha256, hex; the same rows give the same bytes."""
    with store.publish(path) as temporary, naming(path):
        frame.write_parquet(temporary, compression="zstd", statistics=True, row_group_size=rows_per_group)
        check_parquet(temporary, path, frame.height)
        return store.digest_file(temporary)


def holds_values(path: str, column: str) -> bool | None:
    """Return whether a column of numbers has a value other than null, reading only the file's footer.

    None: the footer does not tell, because it lacks counts, or the column holds no numbers.
    """
    with store.open_read(path) as file:
        footer = pq.read_metadata(file)
    for group in map(footer.row_group, range(footer.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        chunk = next((chunk for chunk in chunks if chunk.path_in_schema == column), None)
        if chunk is None or chunk.physical_type not in _NUMBERS or not chunk.is_stats_set:
            return None
        if not chunk.statistics.has_null_count:
            return None
        if chunk.statistics.null_count < group.num_rows:
            return True
    return False
