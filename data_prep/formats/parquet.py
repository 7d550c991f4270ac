"""Publishing tables as Parquet."""

import os
import re

import polars as pl

from pipeline.core import store

ROWS_PER_GROUP = 65_536


def write_table(frame: pl.DataFrame, path: str, rows_per_group: int = ROWS_PER_GROUP) -> None:
    """Publish a table as Parquet; the same rows give the same bytes."""
    with store.publish(path) as temporary:
        try:
            frame.write_parquet(temporary, compression="zstd", statistics=True, row_group_size=rows_per_group)
        except pl.exceptions.PolarsError as error:  # it wraps what the system says, a full disk for one
            if found := re.search(r"os error (\d+)", str(error)):
                number = int(found[1])
                raise OSError(number, os.strerror(number), path) from None
            raise
