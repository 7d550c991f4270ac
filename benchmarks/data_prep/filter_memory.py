"""Measure the memory of the text filter on generated rows, of all processes of a run together.

    python benchmarks/data_prep/filter_memory.py [--full] [--rows N] [--processes P]

Tables of 5 million rows, with LAION-5B's columns, are generated a block at a time; corpus and filter_text
then run on them with the paper's rules. The proportional set size (PSS) of the process and all its
children is read several times a second. Rows in, kept and dropped are compared with what was planted.
Last line: one JSON object; `ours` is the peak in MB, `peer` the limit of 3 GiB.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import shutil
import tempfile
import threading
import time

import polars as pl
import psutil
import pyarrow.parquet as pq

from benchmarks.harness import parse, parser, record, report
from data_prep import corpus
from data_prep.corpus import CorpusStageConfig, TablesConfig
from data_prep.filters import text as filter_text
from data_prep.filters.text import FilterTextConfig
from data_prep.sources.table import TableSource
from pipeline import runner
from pipeline.core.run import Run, read_manifest
from pipeline.core.stage import Stage

ROWS_A_TABLE = 5_000_000
ROWS_A_BLOCK = 250_000
LIMIT_MB = 3 * 1024
# Of every ten rows: one of another language, one with a low score, one too short, one that advertises.
KEPT_OF_TEN = 6


def write_table(path: Path, first: int, count: int) -> None:
    """Write one table of LAION-5B's columns, block by block."""
    writer = None
    for start in range(first, first + count, ROWS_A_BLOCK):
        block = _block(start, min(ROWS_A_BLOCK, first + count - start)).to_arrow()
        if writer is None:
            writer = pq.ParquetWriter(path, block.schema, compression="zstd")
        writer.write_table(block)
    assert writer is not None
    writer.close()


def _block(start: int, count: int) -> pl.DataFrame:
    number = pl.col("number")
    kind = number % 10
    text = number.cast(pl.String)
    scene = pl.concat_str([pl.lit("一只橘猫趴在洒满阳光的窗台上睡觉，第"), text, pl.lit("张照片")])
    return pl.select(number=pl.int_range(start, start + count, dtype=pl.Int64)).select(
        SAMPLE_ID="number",
        URL=pl.concat_str(
            [pl.lit("https://img"), kind.cast(pl.String), pl.lit(".example.cn/p/"), text, pl.lit(".jpg")]
        ),
        TEXT=pl.when(kind == 2)
        .then(pl.lit("猫"))
        .when(kind == 3)
        .then(pl.concat_str([scene, pl.lit("，点击购买")]))
        .otherwise(scene),
        HEIGHT=pl.lit(768.0),
        WIDTH=pl.lit(1024.0),
        LICENSE=pl.lit("?"),
        LANGUAGE=pl.when(kind == 0).then(pl.lit("ja")).otherwise(pl.lit("zh")),
        NSFW=pl.lit("UNLIKELY"),
        similarity=pl.when(kind == 1).then(0.2).otherwise(0.26 + kind / 100),
    )


class PeakMemory:
    """Sample the PSS of this process and its children until stopped."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._stopping.wait(0.2):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                    continue
            self.peak_mb = max(self.peak_mb, total / 2**20)


def main() -> int:
    made = parser(__doc__, full="50 million rows")
    made.add_argument("--rows", type=int, default=5_000_000)
    made.add_argument("--processes", type=int, default=2)
    options = parse(made)
    num_rows = 50_000_000 if options.full else options.rows
    folder = Path(tempfile.mkdtemp(prefix="filter-memory-"))
    try:
        started = time.perf_counter()
        for number, first in enumerate(range(0, num_rows, ROWS_A_TABLE)):
            write_table(folder / f"{number:05d}.parquet", first, min(ROWS_A_TABLE, num_rows - first))
        size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
        print(
            f"generated {num_rows:,} rows, {size / 1e9:.2f} GB, in {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        source = TableSource(path=str(folder / "*.parquet"), name="generated", kind="laion")
        tables = CorpusStageConfig(corpus=TablesConfig(kind="tables", tables=(source,)))
        stages = (
            Stage("corpus", "", 1, tables, (), corpus.plan, corpus.run),
            Stage("filter_text", "", 1, FilterTextConfig(), ("corpus",), filter_text.plan, filter_text.run),
        )
        run = Run(str(folder / "run"), 0, "local", options.processes, stages)
        before = sum(psutil.Process().cpu_times()[:4])
        started = time.perf_counter()
        with PeakMemory() as memory:
            runner.execute(run, stages, redo=False)
        seconds = time.perf_counter() - started
        cpu = sum(psutil.Process().cpu_times()[:4]) - before
        manifest = read_manifest(run, "filter_text")
        assert manifest is not None
        equal = manifest.num_in == num_rows and manifest.num_kept == num_rows // 10 * KEPT_OF_TEN
        print(
            f"{seconds:.0f} s, {cpu:.0f} CPU s, peak {memory.peak_mb:,.0f} MB;"
            f" dropped {dict(manifest.dropped)}"
        )
        found = record(
            f"filter_memory@{num_rows}",
            ours=memory.peak_mb,
            peer=LIMIT_MB,
            unit="MB",
            equal=equal,
            rows_per_cpu_second=round(num_rows / cpu),
            bytes_out_per_row=round(sum(shard.num_bytes for shard in manifest.shards) / num_rows, 1),
            processes=options.processes,
        )
        return report(found)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
