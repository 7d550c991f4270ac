"""Measure images a CPU second of the stages that read or write images' bytes, for docs/scale.md.

    python benchmarks/data_prep/data_stages.py [--full] [--images N]

Photographs as in benchmarks/data_prep/resize.py lie in a folder, which the run serves to itself over HTTP on
loopback; the real stages download (img2dataset and all, one process) and shards (packing anew) run on them,
and a check of all bytes. CPU seconds of the download are those of its own processes, without the server.
What starting costs is left out of every rate: it is that of the difference of a long and a short run. Each
row has its own address; files behind them repeat.
Last line: one JSON list, a record a stage, with bytes stored an image; there is no peer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import resource
import shutil
import tempfile
import time

import polars as pl

from benchmarks.data_prep.resize import photographs
from benchmarks.harness import parse, parser, record, report
from pipeline import catalog, runner
from pipeline.core.run import read_manifest

NUM_FILES = 32
SHORT_RUN = 32  # images
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
[[evaluation]]
name = "valid"
folder = "{root}/valid"
[dedup]
partitions = 1
[download]
processes = 1
scaled_decode = {scaled}
[filter_image]
remove_evaluation_copies = false
[shards]
samples_per_shard = 10000
[model]
name = "tiny-rn"
[stage2]
epochs = 1
global_batch = 8
lanes = 2
"""


def cpu_seconds(folder: Path, count: int, scaled: bool) -> tuple[dict[str, float], float, float]:
    """Return CPU seconds of each stage and of `verify`, and bytes an image on the wire and stored."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "valid").mkdir()
    for suffix in ("_imgs.tsv", "_texts.jsonl"):  # never read beyond its size
        (folder / "valid" / f"valid{suffix}").write_text("".join(f"{row}\n" for row in range(10)))
    files = photographs(NUM_FILES)
    for number in range(count):
        (folder / "pictures" / f"{number}.jpg").write_bytes(files[number % NUM_FILES])
    rows = {
        "url": [f"{number}.jpg" for number in range(count)],
        "caption": [f"窗台上的第{number}只猫" for number in range(count)],
    }
    pl.DataFrame(rows).write_parquet(folder / "captions.parquet")
    path = folder / "run.toml"
    path.write_text(RECIPE.format(root=folder, scaled=str(scaled).lower()), encoding="utf-8")
    run, _ = catalog.load(str(path))
    found = {}
    for stage in run.stages:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.process_time()
        runner.execute(run, [stage], redo=False)
        own = time.process_time() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        theirs = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
        found[stage.name] = theirs if stage.name == "download" else own
        if stage.name == "shards":
            break
    started = time.process_time()
    assert not runner.verify(run, [run.stage("download")])
    found["verify"] = time.process_time() - started
    manifest = read_manifest(run, "shards")
    assert manifest is not None
    assert manifest.num_kept == count, f"{manifest.num_kept} of {count} images came through"
    stored = sum(shard.num_bytes for shard in manifest.shards if shard.path.endswith(".tar")) / count
    return found, sum(map(len, files)) / NUM_FILES, stored


def main() -> None:
    made = parser(__doc__, full="4,000 images")
    made.add_argument("--images", "--pictures", type=int, default=600)
    options = parse(made)
    count = 4000 if options.full else options.images
    folder = Path(tempfile.mkdtemp(prefix="data-stages-"))
    records = []
    try:
        for scaled in (False, True):
            short, _, _ = cpu_seconds(folder / f"short{scaled}", SHORT_RUN, scaled)
            long, received, stored = cpu_seconds(folder / f"long{scaled}", count, scaled)
            for stage in ("download",) if scaled else ("download", "shards", "verify"):
                rate = (count - SHORT_RUN) / (long[stage] - short[stage])
                name = f"data_stages/{stage}" + ("/scaled" if scaled else "")
                print(f"{name:<30} {rate:8.1f} images/CPU s")
                records.append(
                    record(
                        name,
                        ours=rate,
                        peer=None,
                        unit="images/CPU s",
                        bytes_received=round(received),
                        bytes_stored=round(stored),
                    )
                )
    finally:
        shutil.rmtree(folder)
    report(records)


if __name__ == "__main__":
    main()
