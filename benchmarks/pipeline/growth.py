"""Measure how the cost of each data stage grows with the corpus: CPU seconds and peak memory, with a fit.

    python benchmarks/pipeline/growth.py [--full] [--rows N …] [--images N …] [--out growth.json]

One table of made pairs goes through corpus, filter_text and dedup; a folder of made images of 96 px, served
on loopback, through the stages from the download to the vocabulary. 125 images are a table and 1,000 a part
of the search for copies, so that files grow in number as those of a large corpus. Each size runs in a process
of its own, with one thread and one process a stage; another makes its data. `--out` keeps each size as soon
as it is measured, and a rerun measures only what is missing. `--full`: 1, 4 and 16 million rows, and 1, 4 and
16 thousand images.
Last line: one JSON list, a record a stage: `ours` is the exponent x of the fit cost = c * size^x (least
squares of the logarithms), `cost` the CPU seconds of each size, `peak_mb` the memory of the process up to
the end of the stage. 1 is linear; below 1 a fixed cost shows.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json
import os
import random
import resource
import subprocess
import tempfile
import time
from collections.abc import Mapping
from typing import Any

os.environ["POLARS_MAX_THREADS"] = "1"  # polars reads it once, when it is imported

import numpy as np

from benchmarks.harness import parse, parser, record, report

ROWS, IMAGES = [62_500, 250_000, 1_000_000], [125, 500, 2_000]
FULL_ROWS, FULL_IMAGES = [1_000_000, 4_000_000, 16_000_000], [1_000, 4_000, 16_000]
OF_ROWS = ("corpus", "filter_text", "dedup")
OF_IMAGES = (
    "download", "filter_image", "gather_hashes", "find_copies", "merge_copies", "dedup_image", "split",
    "shards", "vocabulary",
)  # fmt: skip
IMAGES_OF_TABLE, IMAGES_OF_PART = 125, 1_000
ROWS_AT_ONCE = 1_000_000  # while they are made
COPIES = 0.1  # share of rows that repeat an earlier one
SIDE_PX, CELLS = 96, 8
RECIPE = """
[run]
folder = "{root}/run"
processes = 1
[corpus]
kind = "tables"
[[corpus.tables]]
path = "{root}/captions.parquet"
name = "made"
picture_folder = "{root}/pictures"
{tables}
[download]
processes = 1
short_side_px = 96
host_requests_per_second = 0
host_connections = 0
[filter_image]
min_side_px = 32
remove_evaluation_copies = false
[dedup_image]
max_distance = 3
partitions = {parts}
[split]
share = 0.05
[model]
name = "tiny-rn"
[stage2]
epochs = 1
global_batch = 8
lanes = 2
"""


def make_rows(folder: Path, count: int) -> None:
    """Write one table of pairs, a tenth of which repeat another one."""
    import polars as pl
    import pyarrow.parquet as pq

    from benchmarks.data_prep.filter_text import make_captions, make_words

    rng = random.Random(0)
    pool = make_captions(50_000, make_words(100, rng), rng)
    distinct, writer = count - int(COPIES * count), None
    for start in range(0, count, ROWS_AT_ONCE):
        number = pl.int_range(start, min(start + ROWS_AT_ONCE, count), eager=True) % distinct
        text = number.cast(pl.String)
        url = "https://host" + (number % 997).cast(pl.String) + ".example.com/" + text + ".jpg"
        frame = pl.DataFrame({"url": url, "caption": text + pool.gather(number % len(pool))})
        table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
        writer = writer or pq.ParquetWriter(folder / "captions.parquet", table.schema)
        writer.write_table(table, row_group_size=100_000)
    assert writer is not None
    writer.close()


def make_images(folder: Path, count: int) -> None:
    """Write images of random patches, none like another, with a caption each."""
    import cv2
    import polars as pl

    rng = np.random.default_rng(0)
    for number in range(count):
        cells = rng.integers(0, 256, (CELLS, CELLS, 3), dtype=np.uint8)
        image = cv2.resize(cells, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / "pictures" / f"{number}.jpg"), image)
    urls, captions = [f"{n}.jpg" for n in range(count)], [f"窗台上的第{n}只猫" for n in range(count)]
    pl.DataFrame({"url": urls, "caption": captions}).write_parquet(folder / "captions.parquet")


def measure(kind: str, count: int) -> dict[str, dict[str, float]]:
    """Return CPU seconds and the peak memory in MB of each stage; this process must be new."""
    from pipeline import catalog, runner

    stages = OF_ROWS if kind == "rows" else OF_IMAGES
    found = {}
    with tempfile.TemporaryDirectory(prefix="growth-") as root:
        folder = Path(root)
        (folder / "pictures").mkdir()
        # In a process of its own: the peak of this one is then that of the stages.
        subprocess.run([sys.executable, __file__, "--make", kind, str(count), root], check=True)
        recipe, tables = RECIPE, f"[dedup]\npartitions = {max(4, count // IMAGES_OF_TABLE)}"
        if kind == "rows":  # with addresses of their own, and as many tables as a run makes by itself
            recipe, tables = recipe.replace('picture_folder = "{root}/pictures"\n', ""), ""
        filled = recipe.format(root=root, tables=tables, parts=max(1, count // IMAGES_OF_PART))
        (folder / "run.toml").write_text(filled, encoding="utf-8")
        run, _ = catalog.load(str(folder / "run.toml"))
        for stage in run.stages:
            before = _used(stage.name)
            runner.execute(run, [stage], redo=False)
            if stage.name in stages:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
                found[stage.name] = {"seconds": _used(stage.name) - before, "peak_mb": round(peak)}
            if stage.name == stages[-1]:
                break
    return found


def _used(stage: str) -> float:
    """Return the CPU seconds so far; of the download those of its own processes, without the server's."""
    theirs = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = 0.0 if stage == "download" else time.process_time()
    return own + theirs.ru_utime + theirs.ru_stime


def exponent(cost: Mapping[int, float]) -> float:
    """Return x of the fit cost = c * size^x."""
    sizes, costs = np.log([*cost]), np.log([max(seconds, 1e-3) for seconds in cost.values()])
    return float(np.polyfit(sizes, costs, 1)[0])


def measure_missing(known: dict[str, Any], kind: str, counts: list[int], out: Path | None) -> None:
    """Measure the sizes of a kind that are not known, each in a new process; keep each at once."""
    for count in counts:
        if str(count) in known.setdefault(kind, {}):
            continue
        command = [sys.executable, __file__, "--one", kind, str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        known[kind][str(count)] = json.loads(done.stdout.splitlines()[-1])
        print(f"{count:,} {kind}: {known[kind][str(count)]}", flush=True)
        if out is not None:
            out.write_text(json.dumps(known, indent=1), encoding="utf-8")


def main() -> int:
    made = parser(__doc__, full="1, 4 and 16 million rows, 1, 4 and 16 thousand images")
    made.add_argument("--rows", type=int, nargs="+")
    made.add_argument("--images", type=int, nargs="+")
    made.add_argument("--out", type=Path, help="file that keeps what is measured")
    made.add_argument("--one", nargs=2, metavar=("KIND", "N"), help="measure one size in this process")
    made.add_argument(
        "--make", nargs=3, metavar=("KIND", "N", "FOLDER"), help="only make the data of one size"
    )
    options = parse(made)
    if options.make is not None:
        kind, count, folder = options.make
        (make_rows if kind == "rows" else make_images)(Path(folder), int(count))
        return 0
    if options.one is not None:
        kind, count = options.one
        print(json.dumps(measure(kind, int(count))))
        return 0
    known: dict[str, Any] = {}
    if options.out is not None and options.out.exists():
        known = json.loads(options.out.read_text(encoding="utf-8"))
    sizes = {
        "rows": options.rows or (FULL_ROWS if options.full else ROWS),
        "images": options.images or (FULL_IMAGES if options.full else IMAGES),
    }
    records = []
    for kind, counts in sizes.items():
        measure_missing(known, kind, counts, options.out)
        for stage in OF_ROWS if kind == "rows" else OF_IMAGES:
            of_sizes = {count: known[kind][str(count)][stage] for count in counts}
            cost = {count: found["seconds"] for count, found in of_sizes.items()}
            records.append(
                record(
                    f"growth/{stage}@{counts[0]:,} to {counts[-1]:,} {kind}",
                    ours=exponent(cost),
                    peer=None,
                    unit="exponent",
                    cost={str(count): round(seconds, 2) for count, seconds in cost.items()},
                    peak_mb={str(count): found["peak_mb"] for count, found in of_sizes.items()},
                )
            )
    return report(records)


if __name__ == "__main__":
    sys.exit(main())
