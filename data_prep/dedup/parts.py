"""Tables of which each task of the next stage reads one part.

A shuffle has two steps: tasks over neighbouring tables sort their rows by part, and tasks over parts read
theirs of each file. The rows of a part fill row groups of their own, so reading one costs a look at the
file's footer and one range of bytes a column.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from data_prep.formats.parquet import ROWS_PER_GROUP
from pipeline.core import store
from pipeline.core.files.written import check_parquet, naming


def write_parts(rows: pl.DataFrame, path: str) -> str:
    """Publish rows with a column `part` as Parquet and return its sha256, hex.

    Rows of a part keep their order; the same rows give the same bytes.
    """
    rows = rows.sort("part", maintain_order=True)
    part_N = rows["part"].to_numpy()
    starts = [0, *(np.flatnonzero(np.diff(part_N)) + 1).tolist(), rows.height]
    table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
    with store.publish(path) as temporary, naming(path):
        # Digests repeat too seldom for dictionaries, and only the part is ever searched for.
        with pq.ParquetWriter(
            temporary, table.schema, compression="zstd", use_dictionary=False, write_statistics=["part"]
        ) as writer:
            for start, end in itertools.pairwise(starts):
                writer.write_table(table.slice(start, end - start), row_group_size=ROWS_PER_GROUP)
        check_parquet(temporary, path, rows.height)
        return store.digest_file(temporary)


def read_part(paths: Sequence[str], part: int, columns: Sequence[str]) -> pl.DataFrame:
    """Return some columns of a part's rows in all files, with `table`, the number of the file, and `row`."""
    found = [
        pl.scan_parquet(path, row_index_name="row")
        .filter(pl.col("part") == part)
        .select("row", *columns, table=pl.lit(number, pl.UInt32))
        for number, path in enumerate(paths)
    ]
    return pl.concat(found).collect()
