"""Rows of a run by their keys, with small images.

From `dedup` on, each table holds a range of keys, so a look-up reads one table and only the row groups that
can hold the key. Files that have been deleted are skipped, as are rows without an image.
"""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from data_prep.corpus_facts import kept_tables, table_name
from data_prep.dedup.exact import partition_of_key
from data_prep.download.stage import partition_of
from eval.report.sources import small_image
from pipeline.core.files.foreign import foreign
from pipeline.core.files.images import BadImageError
from pipeline.core.records import InputError
from pipeline.core.shard_format import SIDECAR, TAR, ByteRangePool
from pipeline.core.stage import Context

_PLACE = ("tar", "offset_bytes", "size_bytes")


class RowLookup(contextlib.AbstractContextManager["RowLookup"]):
    """Looks up rows in the tables of finished stages, and keeps the tars open that it reads images from."""

    def __init__(self, context: Context) -> None:
        self._context = context
        dedup = kept_tables(context, "dedup") if "dedup" in context.parents else []
        self._partitions = [table_name(shard) for shard in dedup]
        self._tables: dict[str, dict[str, str]] = {}
        self._tars = ByteRangePool(lambda name: context.path_in("download", name))

    def find(self, stage: str, keys: Iterable[str], columns: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return key → the row's columns in the tables of `stage`, for the keys that the tables hold.

        Rows of `download` and later stages include the position of their image.
        """
        tables = self._tables_of(stage)
        wanted: dict[str, list[str]] = {}
        for key in dict.fromkeys(keys):
            if self._partitions and (path := tables.get(self._partition(key))):
                wanted.setdefault(path, []).append(key)
        found: dict[str, dict[str, Any]] = {}
        for path, some in wanted.items():
            full = self._context.path_in(stage, path)
            with contextlib.suppress(InputError, OSError), foreign(full, "table"):  # deleted or damaged
                table = pl.scan_parquet(full)
                names = table.collect_schema().names()
                # Tables are sorted by key and have statistics, so row groups outside the range are not read.
                table = table.filter(
                    pl.col("key").is_between(pl.lit(min(some)), pl.lit(max(some))) & pl.col("key").is_in(some)
                )
                known = [name for name in ("key", *columns, *_PLACE) if name in names]
                for row in (
                    table.select(list(dict.fromkeys(known))).collect(engine="streaming").iter_rows(named=True)
                ):
                    if "offset_bytes" in row:
                        row["tar"] = row.get("tar") or path.replace("kept/", "pictures/").replace(
                            SIDECAR, TAR
                        )
                    found[row["key"]] = row
        return found

    def small(self, row: Mapping[str, Any] | None, side_px: int = 96) -> bytes | None:
        """Return a small WebP of a row's image; None if it has no readable image."""
        if row is None or row.get("offset_bytes") is None:
            return None
        try:
            data = self._tars.read(row["tar"], row["offset_bytes"], row["size_bytes"], f"{row['key']}.jpg")
            return small_image(data, side_px)
        except (InputError, BadImageError, OSError):
            return None

    def __exit__(self, *error: object) -> None:
        self._tars.__exit__(*error)

    def _partition(self, key: str) -> str:
        return self._partitions[partition_of_key(key, len(self._partitions))]

    def _tables_of(self, stage: str) -> dict[str, str]:
        """Return partition → table of a stage."""
        if stage not in self._tables:
            manifest = self._context.parents.get(stage)
            folder = "pictures/" if stage == "download" else "kept/"
            self._tables[stage] = {
                partition_of(shard.path): shard.path
                for shard in (manifest.shards if manifest else ())
                if shard.path.startswith(folder) and shard.path.endswith(SIDECAR)
            }
        return self._tables[stage]
