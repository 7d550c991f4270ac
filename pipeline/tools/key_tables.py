"""Which tables of a run may hold a row: its key names one of thousands, because rows are shuffled by key."""

import bisect
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from data_prep.dedup.exact import partition_of_key
from pipeline.core import store
from pipeline.core.records import Manifest
from pipeline.core.run import Run, read_manifest

_PACKED = ("shards", "validation")  # rows that [split] set aside are packed like training rows
_WHOLE = ("kept", "pictures")  # folders with a table of every partition


class KeyTables:
    """The tables of a run's finished stages; each manifest is read once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._manifests: dict[str, Manifest | None] = {}

    def manifest(self, stage: str) -> Manifest | None:
        """Return the manifest of a stage; None if it is not finished, or not in the run."""
        if stage not in self._manifests:
            self._manifests[stage] = read_manifest(self._run, stage)
        return self._manifests[stage]

    def all(self, stage: str, prefix: str = "") -> list[str]:
        """Return the paths of a stage's tables that have rows, of those below `prefix`."""
        return [self._path(stage, name) for name in self._names(stage, prefix)]

    def among(self, stage: str, names: Sequence[str]) -> list[str]:
        """Return the paths of those of some tables that a stage has, with rows."""
        there = set(self._names(stage, ""))
        return [self._path(stage, name) for name in names if name in there]

    def find(
        self, stage: str, prefix: str, key: str, columns: Sequence[str] | None = None
    ) -> Mapping[str, Any] | None:
        """Return the first row with a key in a stage's tables below `prefix`, or None."""
        for path in self._of_key(stage, prefix, key):
            rows = pl.scan_parquet(path).filter(key=key)
            found = (rows if columns is None else rows.select(columns)).head(1).collect()
            if found.height:
                return found.row(0, named=True)
        return None

    def shard_of(self, key: str) -> str | None:
        """Return the shard and member with a key's sample, or None. Sidecars are in the order of keys."""
        for stage in _PACKED:
            paths = self.all(stage)
            number = bisect.bisect_left(paths, key, key=_last_key)
            if number < len(paths) and _has_key(paths[number], key):
                return f"{paths[number].removesuffix('.parquet')}.tar, member {key}.jpg"
        return None

    def _of_key(self, stage: str, prefix: str, key: str) -> list[str]:
        manifest = self.manifest(stage)
        if manifest is None:
            return []
        partitions = {
            _partition(shard.path) for shard in manifest.shards if shard.path.partition("/")[0] in _WHOLE
        }
        number = partition_of_key(key, max(partitions, default=0) + 1)
        # A drop table of dedup is of its first partition and of all before that of the next table.
        firsts = map(_partition, self._names(stage, prefix, has_rows=False))
        first = max((at for at in firsts if at <= number), default=None)
        return [self._path(stage, name) for name in self._names(stage, prefix) if _partition(name) == first]

    def _names(self, stage: str, prefix: str, *, has_rows: bool = True) -> list[str]:
        manifest = self.manifest(stage)
        return [
            shard.path
            for shard in (manifest.shards if manifest else ())
            if shard.path.startswith(prefix)
            and shard.path.endswith(".parquet")
            and (shard.num_samples or not has_rows)
        ]

    def _path(self, stage: str, name: str) -> str:
        return store.join(self._run.folder, stage, name)


def _partition(path: str) -> int:
    """Return the first partition of a table: 7 of `dropped/00007.retry1.parquet`."""
    return int(os.path.basename(path).partition(".")[0])


@functools.cache
def _last_key(path: str) -> str:
    return str(pl.scan_parquet(path).select("key").tail(1).collect().item())


def _has_key(path: str, key: str) -> bool:
    return bool(pl.scan_parquet(path).filter(key=key).select(pl.len()).collect().item())
