"""Stage shards: what training reads. Pictures packed in the corpus's order, a sidecar beside each tar.

Each tar holds `{key}.jpg` and `{key}.txt` for each sample, and but for the last one the same number of
samples. The sidecar (Parquet, rows in tar order) holds key, offset_bytes, size_bytes (of the picture),
caption, source, url, score, width_px, height_px (as downloaded from the web), image_sha256 (of the stored
bytes), perceptual_hash, and the columns that sources carry.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from data_prep.corpus import kept_tables, rows_stage
from data_prep.drop_table import write_table
from data_prep.tar_members import TarWriter
from pipeline import store
from pipeline.records import InputError
from pipeline.stage import Context, Outcome, Progress, Task

_SIDECAR = (
    "key", "offset_bytes", "size_bytes", "caption", "source", "url", "score", "width_px", "height_px",
    "image_sha256", "perceptual_hash",
)  # fmt: skip
_INTERNAL = (
    "file", "row", "tar", "source_sha256", "stored_width_px", "stored_height_px",
    "picture_at",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsConfig:
    """`[shards]`."""

    samples_per_shard: int = 10_000  # about 300 MB at 256 px


def tasks(config: ShardsConfig, context: Context) -> list[Task]:
    """One task a shard: samples number*n to (number+1)*n of all kept samples in order."""
    kept = kept_tables(context, rows_stage(context))
    pictures = {
        Path(s.path).stem: s.digest for s in context.parents["download"].shards if s.path.endswith(".tar")
    }
    total = sum(shard.num_samples for shard in kept)
    plan = []
    for number, first in enumerate(range(0, total, config.samples_per_shard)):
        end = min(first + config.samples_per_shard, total)
        pieces, begin = [], 0
        for shard in kept:
            low, high = max(first, begin), min(end, begin + shard.num_samples)
            if low < high:
                pieces.append({"table": shard.path, "first": low - begin, "count": high - low})
            begin += shard.num_samples
        names = [str(piece["table"]) for piece in pieces]
        digests = {shard.path: shard.digest for shard in kept if shard.path in names}
        digests |= {f"pictures {Path(name).stem}": pictures[Path(name).stem] for name in names}
        plan.append(Task(f"{number:05d}", digests, {"pieces": pieces}))
    return plan


def run(config: ShardsConfig, context: Context, task: Task, progress: Progress) -> Outcome:
    """Pack one shard."""
    rows = pl.concat(
        [
            pl.scan_parquet(context.path_in(rows_stage(context), piece["table"])).slice(
                piece["first"], piece["count"]
            )
            for piece in task.arguments["pieces"]
        ],
        how="diagonal",
    ).collect()
    tar_path, table_path = f"{task.name}.tar", f"{task.name}.parquet"
    with store.publish(context.path(tar_path)) as temporary, contextlib.ExitStack() as stack:
        writer = stack.enter_context(TarWriter(temporary))
        places = []
        sources = {
            name: stack.enter_context(store.open_read(context.path_in("download", name)))
            for name in rows["tar"].unique(maintain_order=True)
        }
        for key, tar, offset, size, caption in rows.select(
            "key", "tar", "offset_bytes", "size_bytes", "caption"
        ).iter_rows():
            sources[tar].seek(offset)
            data = sources[tar].read(size)
            if len(data) < size:
                path = context.path_in("download", tar)
                raise InputError(f"{path}: ends inside {key}.jpg; run `--stage download --redo`")
            places.append(writer.add(f"{key}.jpg", data))
            writer.add(f"{key}.txt", caption.encode("utf-8"))
    carried = [name for name in rows.columns if name not in _SIDECAR and name not in _INTERNAL]
    sidecar = rows.with_columns(
        pl.Series("offset_bytes", [place.offset_bytes for place in places], dtype=pl.Int64)
    ).select(*_SIDECAR, *carried)
    write_table(sidecar, context.path(table_path))
    return Outcome({tar_path: rows.height, table_path: rows.height}, num_in=rows.height, num_kept=rows.height)
