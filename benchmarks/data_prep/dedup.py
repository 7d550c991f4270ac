"""Measure the removal of exact duplicates: the real stage against duckdb and polars on the whole table.

    python benchmarks/data_prep/dedup.py [--full] [--rows N]

A tenth of the rows are copies of others. The stage reads what filter_text would have written (tables
sorted by key) and runs its tasks one after the other in a separate process, as the runner does; polars
takes `unique` and duckdb `DISTINCT ON` of the same rows in memory, each also in a separate process.
Rates are rows a CPU second; peak memory is the largest resident set of the process. Kept rows are
compared by key, table and row.
Last line: one JSON list: rate and peak memory against each peer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import math
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import polars as pl

from benchmarks.harness import parse, parser, record, report
from data_prep.dedup import exact as dedup
from data_prep.dedup.exact import DedupConfig
from data_prep.formats.keys import with_key
from data_prep.formats.parquet import write_table
from pipeline.core import store
from pipeline.core.records import Manifest, Shard
from pipeline.core.stage import Context

ROWS_A_TABLE = 500_000
ROWS_A_PARTITION = 10_000  # what download likes


def generate(folder: Path, num_rows: int) -> Context:
    """Write tables as filter_text leaves them; every tenth row repeats a row of any table before."""
    shards = []
    for number, first in enumerate(range(0, num_rows, ROWS_A_TABLE)):
        count = min(ROWS_A_TABLE, num_rows - first)
        rows = pl.select(row=pl.int_range(first, first + count, dtype=pl.Int64)).with_columns(
            which=pl.when(pl.col("row") % 10 == 9)
            .then(pl.col("row") * 2_654_435_761 % (pl.col("row") // 10 * 10))
            .otherwise(pl.col("row"))
        )
        # A copy of a copy: follow it once, so that every copy repeats a row that is none.
        rows = rows.with_columns(
            which=pl.when(pl.col("which") % 10 == 9).then(pl.col("which") - 1).otherwise("which")
        )
        text = pl.col("which").cast(pl.String)
        table = with_key(
            rows.lazy().select(
                file=pl.lit(number, dtype=pl.Int32),
                source=pl.lit("generated"),
                row=pl.col("row") - first,
                url=pl.concat_str([pl.lit("https://img.example.cn/pictures/"), text, pl.lit(".jpg")]),
                caption=pl.concat_str(
                    [pl.lit("第"), text, pl.lit("张照片，一只橘猫趴在洒满阳光的窗台上睡觉")]
                ),
            )
        )
        path = f"kept/{number:05d}.parquet"
        write_table(table.collect().sort("key", "row"), str(folder / "filter_text" / path), 4_096)
        size = store.num_bytes(str(folder / "filter_text" / path))
        shards.append(Shard(path, count, size, f"generated {number}"))
    manifest = Manifest("filter_text", 1, "", "", {}, tuple(shards), num_rows, num_rows, {})
    return Context(str(folder), "dedup", 0, {"filter_text": manifest})


def ours(context: Context, out: str) -> None:
    total = context.parents["filter_text"].num_kept
    config = DedupConfig(partitions=math.ceil(total / ROWS_A_PARTITION))
    for task in dedup.plan(config, context):
        dedup.run(config, context, task, lambda done, total, text="": None)


def polars_unique(context: Context, out: str) -> None:
    rows = pl.read_parquet(context.path_in("filter_text", "kept", "*.parquet"))
    rows.sort("file", "row").unique(["url", "caption"], keep="first").sort("key").write_parquet(out)


def duckdb_distinct(context: Context, out: str) -> None:
    import duckdb

    tables = context.path_in("filter_text", "kept", "*.parquet")
    query = (
        f"COPY (SELECT DISTINCT ON (url, caption) * FROM read_parquet('{tables}')"
        f" ORDER BY url, caption, file, row) TO '{out}' (FORMAT parquet)"
    )
    duckdb.connect(config={"threads": len(os.sched_getaffinity(0))}).execute(query)


def key_scan(context: Context, out: str) -> None:
    """Look at every key and find none: what reading a table without a hit costs."""
    tables = pl.scan_parquet(context.path_in("filter_text", "kept", "*.parquet"))
    assert tables.filter(pl.col("key").str.ends_with("none")).collect().height == 0


def _measured(engine: Callable[[Context, str], None], context: Context, out: str, pipe: Connection) -> None:
    cpu, started = time.process_time(), time.perf_counter()
    engine(context, out)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.send((seconds, peak, time.process_time() - cpu))


def measure(engine: Callable[[Context, str], None], context: Context, out: str) -> tuple[float, float, float]:
    """Return wall seconds, peak MB and CPU seconds of an engine in a fresh process."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_measured, args=(engine, context, out, there)
    )
    process.start()
    there.close()
    answer: tuple[float, float, float] = here.recv()
    process.join()
    return answer


def kept_rows(pattern: str) -> pl.DataFrame:
    return pl.scan_parquet(pattern).select("key", "file", "row").sort("key").collect()


def main() -> None:
    made = parser(__doc__, full="10 million rows")
    made.add_argument("--rows", type=int, default=2_000_000)
    options = parse(made)
    num_rows = 10_000_000 if options.full else options.rows
    folder = Path(tempfile.mkdtemp(prefix="dedup-"))
    try:
        context = generate(folder, num_rows)
        out = str(folder / "peer.parquet")
        seconds, peak, cpu = measure(ours, context, "")
        found = kept_rows(str(folder / "dedup" / "kept" / "*.parquet"))
        print(
            f"ours    {num_rows:,} rows in {seconds:.1f} s ({cpu:.1f} CPU s), peak {peak:,.0f} MB,"
            f" {found.height:,} kept"
        )
        records = []
        for name, engine in (("polars", polars_unique), ("duckdb", duckdb_distinct)):
            peer_seconds, peer_peak, peer_cpu = measure(engine, context, out)
            equal = kept_rows(out).equals(found)
            print(
                f"{name:<7} in {peer_seconds:.1f} s ({peer_cpu:.1f} CPU s), peak {peer_peak:,.0f} MB,"
                f" same rows: {equal}"
            )
            for label, mine, theirs, unit in (
                (f"dedup/{name}", num_rows / cpu, num_rows / peer_cpu, "rows/CPU s"),
                (f"dedup/memory/{name}", peak, peer_peak, "MB"),
            ):
                records.append(record(label, mine, theirs, unit, equal=equal, rows=num_rows))
        _, _, scan_cpu = measure(key_scan, context, "")
        print(f"reading the keys: {num_rows / scan_cpu / 1e6:.1f} million rows a CPU second")
        records.append(record("dedup/keys", num_rows / scan_cpu, None, "rows/CPU s", rows=num_rows))
        report(records)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
