"""Measure the writing of shards: the stage against a plain copy of the bytes, and where its time goes.

    python benchmarks/data_prep/shards.py [--full] [--samples N]

Images of some 25 kB lie in one tar as the download leaves them; the stage packs them with their
captions and checks their digests. The plain copy reads the images' tar and writes a file of that size,
with fsync: what the disk can do. webdataset's TarWriter packs the same samples. All three take turns, and
a side's time is that of its best round. The profile sorts the stage's time into the disk (read, write,
fsync, rename), hashing, and everything else.
Last line: one JSON list; `equal` says that webdataset reads back the very samples from ours.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cProfile
import os
import pstats
import shutil
import tempfile
import time
from collections.abc import Callable

import numpy as np
import polars as pl
import webdataset

from benchmarks.harness import parse, parser, record, report
from data_prep.formats.parquet import write_table
from data_prep.formats.tar import TarWriter
from data_prep.shards import stage as shards
from data_prep.shards.stage import ShardsConfig
from pipeline.core import store
from pipeline.core.records import Manifest, Shard
from pipeline.core.stage import Context, Task

BYTES_AN_IMAGE = 25_000
ROUNDS = 3
COPY_BYTES = 16 << 20
# Functions of a profile by what they wait for.
DISK = (
    "read",
    "write",
    "fsync",
    "replace",
    "seek",
    "flush",
    "close",
    "open",
    "read_parquet",
    "write_parquet",
)
HASHING = ("sha256", "hexdigest", "file_digest", "update")


def prepare(folder: Path, samples: int) -> tuple[Context, Task]:
    """Write a partition of the download and of filter_image, as they leave them; contents do not matter."""
    rng = np.random.default_rng(0)
    noise = rng.bytes(4 * BYTES_AN_IMAGE)
    keys = [f"{number:032x}" for number in range(samples)]
    path = folder / "download" / "pictures" / "00000.tar"
    path.parent.mkdir(parents=True)
    with TarWriter(str(path)) as tar:
        places = []
        for key in keys:
            start, size = (
                int(rng.integers(BYTES_AN_IMAGE)),
                int(rng.integers(10_000, 2 * BYTES_AN_IMAGE - 10_000)),
            )
            places.append(tar.add(f"{key}.jpg", noise[start : start + size]))
    rows = pl.DataFrame(
        {
            "key": keys,
            "offset_bytes": [place.offset_bytes for place in places],
            "size_bytes": [place.size_bytes for place in places],
            "caption": ["一只橘猫趴在洒满阳光的窗台上睡觉"] * samples,
            "image_sha256": [place.sha256 for place in places],
        }
    ).with_columns(
        tar=pl.lit("pictures/00000.tar"), source=pl.lit("made"), url=pl.lit("https://a.cn/1.jpg"),
        score=pl.lit(0.3), width_px=pl.lit(256), height_px=pl.lit(256), perceptual_hash=pl.lit(bytes(48)),
    )  # fmt: skip
    write_table(rows, str(folder / "filter_image" / "kept" / "00000.parquet"))
    kept = Manifest(
        "filter_image", 1, "", "", {}, (Shard("kept/00000.parquet", samples, 0, "a"),), samples, samples, {}
    )
    taken = Manifest(
        "download", 1, "", "", {}, (Shard("pictures/00000.tar", samples, 0, "b"),), samples, samples, {}
    )
    context = Context(str(folder), "shards", 0, {"filter_image": kept, "download": taken})
    return context, shards.plan(ShardsConfig(samples_per_shard=samples), context)[0]


def ours(context: Context, task: Task) -> None:
    shards.run(ShardsConfig(), context, task, lambda done, total, text="": None)


def plain_copy(context: Context, task: Task) -> None:
    """Copy the bytes only: no other program can be faster on this disk."""
    with (
        open(context.path_in("download", "pictures", "00000.tar"), "rb") as source,
        store.publish(context.path("copy")) as temporary,
        open(temporary, "wb") as out,
    ):
        shutil.copyfileobj(source, out, COPY_BYTES)


def webdataset_writer(context: Context, task: Task) -> None:
    rows = pl.read_parquet(context.path_in("filter_image", "kept", "00000.parquet"))
    source_path = context.path_in("download", "pictures", "00000.tar")
    columns = ("key", "offset_bytes", "size_bytes", "caption")
    with (
        store.publish(context.path("peer.tar")) as temporary,
        open(source_path, "rb") as source,
        webdataset.TarWriter(temporary) as out,
    ):
        for key, offset, size, caption in rows.select(columns).iter_rows():
            source.seek(offset)
            out.write({"__key__": key, "jpg": source.read(size), "txt": caption})


def profile(context: Context, task: Task) -> dict[str, float]:
    """Return seconds of the stage by what they went to."""
    profiler = cProfile.Profile()
    profiler.runcall(ours, context, task)
    found = {"disk": 0.0, "hashing": 0.0, "other": 0.0}
    for (_, _, name), (_, _, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        bare = (
            name.strip("<>{}")
            .replace("built-in method ", "")
            .split("'")[1 if "'" in name else 0]
            .split(".")[-1]
        )
        kind = "disk" if bare in DISK else "hashing" if any(word in name for word in HASHING) else "other"
        found[kind] += own
    return found


def samples_of(path: str) -> list[tuple[str, bytes, bytes]]:
    return list(webdataset.WebDataset(path, shardshuffle=False).to_tuple("__key__", "jpg", "txt"))


def main() -> int:
    made = parser(__doc__, full="40,000 samples, a gigabyte")
    made.add_argument("--samples", type=int, default=10_000)
    options = parse(made)
    folder = Path(tempfile.mkdtemp(prefix="shards-"))
    try:
        context, task = prepare(folder, 40_000 if options.full else options.samples)
        sides: dict[str, Callable[[Context, Task], None]] = {
            "ours": ours, "copy": plain_copy, "webdataset": webdataset_writer,
        }  # fmt: skip
        best = dict.fromkeys(sides, float("inf"))
        for _ in range(ROUNDS):
            for name, side in sides.items():
                os.sync()
                started = time.perf_counter()
                side(context, task)
                best[name] = min(best[name], time.perf_counter() - started)
        megabytes = os.path.getsize(context.path("00000.tar")) / 1e6
        equal = samples_of(context.path("00000.tar")) == samples_of(context.path("peer.tar"))
        parts = profile(context, task)
        total = sum(parts.values())
        for name, seconds in best.items():
            print(f"{name:<10} {megabytes / seconds:7.0f} MB/s")
        print("profile    " + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items()))
        records = [
            record(
                f"shards/{name}",
                ours=megabytes / best["ours"],
                peer=megabytes / best[name],
                unit="MB/s",
                equal=equal,
                profile={part: round(seconds / total, 3) for part, seconds in parts.items()},
            )
            for name in ("copy", "webdataset")
        ]
        return report(records)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
