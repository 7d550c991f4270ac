"""Publishing tables as Parquet."""

import polars as pl

from pipeline.core import store
from pipeline.core.files.written import check_parquet, naming

ROWS_PER_GROUP = 65_536


def write_table(frame: pl.DataFrame, path: str, rows_per_group: int = ROWS_PER_GROUP) -> str:
    """Publish a table as Parquet and return its sha256, hex; the same rows give the same bytes."""
    with store.publish(path) as temporary, naming(path):
        frame.write_parquet(temporary, compression="zstd", statistics=True, row_group_size=rows_per_group)
        check_parquet(temporary, path, frame.height)
        return store.digest_file(temporary)
