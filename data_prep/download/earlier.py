"""What earlier builds have of a partition's rows, so that the web is asked only for the rest.

A changed rule or another month of tables changes most partitions; keys tell which of their rows are new.
Before such a redo the runner moves what the download has published to `earlier/` of the stage's folder
(`Stage.keeps`); `[download] reuse` names other runs. Images on disk are read anew: their bytes may change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from data_prep.accounting.drop_table import HTTP_STATUS
from data_prep.dedup.exact import partition_of_key, partition_range
from data_prep.download.config import DownloadConfig
from data_prep.download.pack import KNOWN_SCHEMA
from data_prep.download.reasons import may_pass
from data_prep.formats.keys import KEY_HEX_DIGITS
from data_prep.rules.copies import Marks
from pipeline.core import store
from pipeline.core.changes import read_started
from pipeline.core.files.foreign import foreign
from pipeline.core.records import ConfigError, InputError, Manifest
from pipeline.core.stage import EARLIER, UNFINISHED, Context

# Settings that say how an image is stored; others say how it is asked for.
_STORED_BY = ("short_side_px", "jpeg_quality", "max_pixels", "scaled_decode")


@dataclass(frozen=True, slots=True)
class _Build:
    """The download of an earlier build."""

    folder: str  # its files are in
    num_partitions: int
    tables: Mapping[int, list[str]]  # partition → tables of its images
    drops: Mapping[int, list[str]]  # partition → drop tables

    @classmethod
    def of(
        cls, folder: str, manifest: Manifest, *, has_failures: bool, num_partitions: int | None = None
    ) -> "_Build":
        """Return the build of a manifest. `num_partitions`: if that has not all of them."""
        tables: dict[int, list[str]] = {}
        drops: dict[int, list[str]] = {}
        for shard in manifest.shards:
            place, _, name = shard.path.rpartition("/")
            if name.endswith(".parquet") and (place == "pictures" or has_failures):
                found = tables if place == "pictures" else drops
                found.setdefault(int(name.partition(".")[0]), []).append(shard.path)
        return cls(folder, num_partitions or max(tables, default=-1) + 1, tables, drops)

    def partitions_of(self, number: int, num_partitions: int) -> range:
        """Return its partitions that may hold rows of a partition of a build with another number of them."""
        first, end = partition_range(number, num_partitions)
        low = partition_of_key(first.ljust(KEY_HEX_DIGITS, "0"), self.num_partitions)
        if end is None:
            return range(low, self.num_partitions)
        last = f"{int(end, 16) - 1:0{len(end)}x}".ljust(KEY_HEX_DIGITS, "f")
        return range(low, partition_of_key(last, self.num_partitions) + 1)


def keeps(config: DownloadConfig, before: Mapping[str, Any]) -> bool:
    """Return whether images stored with the settings `before` are those that `config` would store."""
    return all(before.get(name) == getattr(config, name) for name in _STORED_BY)


class EarlierBuilds:
    """The builds that a download may take images from."""

    def __init__(self, config: DownloadConfig, context: Context, config_digest: str) -> None:
        """Look up this run's earlier build and those of `[download] reuse`.

        Failures count only if they were met with the same settings, as `config_digest` tells.

        Raises:
            ConfigError: for a run in `reuse` whose download is not finished, or stored images otherwise.
        """
        self._num_partitions = sum(
            shard.path.startswith("kept/") for shard in context.parents["dedup"].shards
        )
        self._builds = []
        own = Context(context.path(), EARLIER, 0, {})
        started = read_started(own)
        same = started is not None and started.config_digest == config_digest
        if (manifest := _manifest(own.path("manifest.json"))) is not None:
            self._builds.append(_Build.of(own.path(), manifest, has_failures=same))
        if (manifest := _manifest(own.path(UNFINISHED))) is not None:
            self._builds.append(
                _Build.of(own.path(), manifest, has_failures=same, num_partitions=self._num_partitions)
            )
        for run_folder in config.reuse:
            other = Context(run_folder, "download", 0, {})
            manifest, started = _manifest(other.path("manifest.json")), read_started(other)
            if manifest is None or started is None or started.settings is None:
                raise ConfigError(
                    f"[download] reuse: {run_folder} has no finished download; name the folder of a run, or"
                    f" finish it"
                )
            if not keeps(config, started.settings["config"]):
                raise ConfigError(
                    f"[download] reuse: {run_folder} stores its images otherwise: its {', '.join(_STORED_BY)}"
                    f" are not those of this run"
                )
            same = started.config_digest == config_digest
            self._builds.append(_Build.of(other.path(), manifest, has_failures=same))

    def known(self, partition: str, keys: pl.Series) -> pl.DataFrame:
        """Return what is known of rows with these keys (`KNOWN_SCHEMA`); the first build that has one counts.

        An image goes before a reason for which there is none; reasons that may pass say nothing.
        """
        wanted = pl.DataFrame({"key": keys})
        parts = [pl.DataFrame(schema=KNOWN_SCHEMA)]
        for read in (_images, _failures):
            for build in self._builds:
                paths = build.tables if read is _images else build.drops
                for place in build.partitions_of(int(partition), self._num_partitions):
                    parts += [read(build, path, wanted) for path in paths.get(place, ())]
        return pl.concat(parts).unique("key", keep="first", maintain_order=True)


def _manifest(path: str) -> Manifest | None:
    if not store.exists(path):
        return None
    try:
        return Manifest.from_json(store.read_bytes(path))
    except ValueError:
        raise InputError(f"{path}: damaged manifest; remove its folder, or name another run") from None


def _images(build: _Build, path: str, wanted: pl.DataFrame) -> pl.DataFrame:
    full = store.join(build.folder, path)
    if not store.exists(full):  # of a partition that has not changed, or of a build that was interrupted
        return pl.DataFrame(schema=KNOWN_SCHEMA)
    with foreign(full, "table of images", "repair that run, or take it out of [download] reuse"):
        table = pl.scan_parquet(full)
        names = table.collect_schema().names()
        tar = pl.col("tar") if "tar" in names else pl.lit(_first_tar(path))
        # Older builds marked the images in a later stage.
        marks = [name if name in names else pl.lit(None, pl.Binary).alias(name) for name in Marks._fields]
        return (
            table.join(wanted.lazy(), on="key", how="semi")
            .select(
                "key",
                pl.lit(None, pl.String).alias("reason"),
                pl.lit(None, pl.Int16).alias(HTTP_STATUS),
                pl.col("width_px").alias("original_width_px"),
                pl.col("height_px").alias("original_height_px"),
                "stored_width_px",
                "stored_height_px",
                "source_sha256",
                *marks,
                (pl.lit(f"{build.folder}/") + tar).alias("at_tar"),
                pl.col("offset_bytes").alias("at_offset_bytes"),
                pl.col("size_bytes").alias("at_size_bytes"),
                pl.col("image_sha256").alias("at_sha256"),
            )
            .collect()
            .cast(pl.Schema(KNOWN_SCHEMA))
        )


def _first_tar(table: str) -> str:
    """Return the tar of a table without a column for it: that of the download's first pass."""
    place, _, name = table.rpartition("/")
    return f"{place}/{name.partition('.')[0]}.tar"


def _failures(build: _Build, path: str, wanted: pl.DataFrame) -> pl.DataFrame:
    full = store.join(build.folder, path)
    empty = pl.DataFrame(schema=KNOWN_SCHEMA)
    if not store.exists(full):
        return empty
    with foreign(full, "drop table", "repair that run, or take it out of [download] reuse"):
        found = pl.scan_parquet(full).join(wanted.lazy(), on="key", how="semi").collect()
    if HTTP_STATUS not in found.columns:
        found = found.with_columns(pl.lit(None, pl.Int16).alias(HTTP_STATUS))
    kinds = found.select("reason", HTTP_STATUS).unique()
    lasting = kinds.filter(
        pl.Series([not may_pass(reason, status) for reason, status in kinds.iter_rows()], dtype=pl.Boolean)
    )
    lasts = found.join(lasting, on=["reason", HTTP_STATUS], how="semi", nulls_equal=True)
    return pl.concat([empty, lasts.select("key", "reason", HTTP_STATUS)], how="diagonal")
