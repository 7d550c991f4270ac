"""Index and search 10 million × 512 vectors in a fraction of the memory that they would take.

`cnclip index` builds the index in a separate process, another one searches it; the peak memory of each is
sampled from the system (proportional set size: resident pages of mapped files count). Default: 1 million
rows; `--full` takes 10 million (10 GB of float16 features and 5 GB of index on disk, in `--folder`).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.harness import parse, parser, record, report
from eval.index.partitioned import Embeddings, PartedIndex
from eval.index.truth import exact_neighbours, recall_of
from pipeline.core.arrays import Float32Array

DIM, K, NUM_QUERIES = 512, 10, 256
ROWS_PER_FILE, NUM_CLUSTERS = 500_000, 4096
LIMIT_GIB = 6.0
_BLOCK_ROWS = 50_000


def rows_near(centre_ND: Float32Array, noise: float, rng: np.random.Generator) -> Float32Array:
    """Return unit rows around unit rows: real features lie in clusters, and an index lives on that."""
    rows_ND = rng.standard_normal(centre_ND.shape, dtype=np.float32)
    rows_ND *= noise / DIM**0.5
    rows_ND += centre_ND
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return rows_ND


def write_features(folder: Path, num_rows: int) -> None:
    """Write `img_emb/img_emb_N.npy`, float16, as `cnclip embed --dtype float16` writes them."""
    (folder / "img_emb").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    centre_CD = rows_near(np.zeros((NUM_CLUSTERS, DIM), np.float32), 1.0, rng)
    for number, start in enumerate(range(0, num_rows, ROWS_PER_FILE)):
        count = min(ROWS_PER_FILE, num_rows - start)
        path = folder / "img_emb" / f"img_emb_{number:02d}.npy"
        matrix = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, DIM))
        for row in range(0, count, _BLOCK_ROWS):
            cluster_B = rng.integers(NUM_CLUSTERS, size=min(_BLOCK_ROWS, count - row))
            matrix[row : row + len(cluster_B)] = rows_near(centre_CD[cluster_B], 1.0, rng)
        del matrix


def watch(command: Sequence[str]) -> tuple[float, float]:
    """Return (seconds, peak GiB) of a command, its memory sampled twenty times a second."""
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                peak = max(peak, int(rollup.split("\nPss:")[1].split()[0]))
            except (OSError, IndexError):  # it ends just now
                pass
            time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
    return time.perf_counter() - start, peak / 2**20


def search(folder: Path, parameters: str) -> None:
    """Search in the second process, compare with exact search, write `found.json`."""
    embeddings = Embeddings.open(str(folder / "features"))
    index = PartedIndex.open(str(folder / "index"), keep_open=False)
    sample = np.arange(NUM_QUERIES) * embeddings.num_rows // NUM_QUERIES
    query_QD = rows_near(embeddings.rows(sample), 0.5, np.random.default_rng(1))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        _, rows_QK = index.search(query_QD, K, parameters=parameters)
        seconds.append(time.perf_counter() - start)
    truth = exact_neighbours(embeddings, query_QD, K)
    found = {
        "queries_per_second": NUM_QUERIES / min(seconds),
        "recall": recall_of(embeddings, query_QD, rows_QK, truth).with_ties,
        "bytes_per_vector": index.bytes_per_vector,
    }
    (folder / "found.json").write_text(json.dumps(found))


def main() -> int:
    made = parser(__doc__, full="10 million rows")
    made.add_argument("--factory", default="IVF1024,SQ8")
    made.add_argument("--parameters", default="nprobe=8")
    made.add_argument("--folder", help="where features and index lie meanwhile (default: a temporary one)")
    made.add_argument("--search", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parse(made)
    if options.search:
        search(Path(options.search), options.parameters)
        return 0
    num_rows = 10_000_000 if options.full else 1_000_000
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_features(folder / "features", num_rows)
        cnclip = [sys.executable, "-m", "pipeline", "index", str(folder / "features"), str(folder / "index")]
        settings = ["--factory", options.factory, "--train-rows", "65536", "--num-queries", "500"]
        build_seconds, build_gib = watch([*cnclip, *settings])
        again = [sys.executable, __file__, "--search", str(folder), "--parameters", options.parameters]
        _, search_gib = watch(again)
        found = json.loads((folder / "found.json").read_text())
    print(f"{num_rows:,} × {DIM}, {options.factory} {options.parameters}: built in {build_seconds:.0f} s")
    print(f"peak memory: building {build_gib:.2f} GiB, searching {search_gib:.2f} GiB")
    print(
        f"recall@{K} {found['recall']:.3f}, {found['queries_per_second']:.0f} queries/s in batches of"
        f" {NUM_QUERIES}, {found['bytes_per_vector']:.0f} bytes per vector"
    )
    ours, flat = max(build_gib, search_gib), num_rows * DIM * 4 / 2**30
    equal = found["recall"] >= 0.9 and ours <= LIMIT_GIB
    return report(
        record("large_index/memory", ours, flat, "GiB", equal=equal, build_seconds=build_seconds, **found)
    )


if __name__ == "__main__":
    sys.exit(main())
