"""Build, tune and measure an index of millions of cross-modal vectors within 6 GiB, and keep what is done.

Clip-like images (`clip_like.py`), tuned and asked by texts. Features, parts and results stay in `--folder`:
rerun after a kill, and only what is missing is done. Default: 200,000 × 512; `--full` takes 10 million. It
also measures the rates with which `cnclip plan index` estimates.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json
import tempfile
import time
from typing import Any

import faiss
import numpy as np

from benchmarks.eval.clip_like import ClipLike, write
from benchmarks.eval.large_index import watch
from benchmarks.harness import parse, parser, record, report
from eval.index.tuning.suggest import num_lists

DIM, NUM_TEXTS, TARGET, LIMIT_GIB = 512, 1000, 0.9, 6.0


def rates() -> dict[str, float]:
    """Return GFLOP/s of assigning rows, and GB/s of comparing with 8-bit codes and floats, of one core."""
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    centroids, rows = (rng.standard_normal((count, DIM), dtype=np.float32) for count in (32_768, 4096))
    quantizer = faiss.IndexFlatIP(DIM)
    quantizer.add(centroids)
    codes: Any = faiss.index_factory(DIM, "SQ8", faiss.METRIC_INNER_PRODUCT)
    codes.train(rows)
    for _ in range(60):  # more than caches hold
        codes.add(rows)
    flops, size = 2.0 * DIM * len(rows) * len(centroids), 20.0 * codes.ntotal * DIM
    assign, scan, floats = list[float](), list[float](), list[float]()
    for _ in range(3):
        start = time.process_time()
        quantizer.search(rows, 1)
        assign.append(time.process_time() - start)
        start = time.process_time()
        codes.search(rows[:20], 10)
        scan.append(time.process_time() - start)
        start = time.process_time()
        for query in range(20):  # one at a time: no matrix product
            quantizer.search(rows[query : query + 1], 64)
        floats.append(time.process_time() - start)
    return {
        "assign_gflops_per_core": flops / min(assign) / 1e9,
        "scan_gb_per_second_per_core": size / min(scan) / 1e9,
        "float_gb_per_second_per_core": 20.0 * centroids.nbytes / min(floats) / 1e9,
    }


def main() -> int:
    made = parser(__doc__, full="10 million rows")
    made.add_argument("--rows", type=int, help="so many rows instead")
    made.add_argument("--factory", help="default: IVF with lists for the size, and 8-bit codes")
    made.add_argument("--folder", type=Path, help="keep features, index and results here, and resume")
    options = parse(made)
    num_rows = options.rows or (10_000_000 if options.full else 200_000)
    factory = options.factory or f"IVF{num_lists(num_rows, num_rows // 4)},SQ8"
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "progress.json"
        done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if done.setdefault("rows", num_rows) != num_rows or done.setdefault("factory", factory) != factory:
            sys.exit(f"{path}: of {done['rows']} rows and {done['factory']}; give another --folder")

        def keep(**found: Any) -> None:
            done.update(found)
            path.write_text(json.dumps(done, indent=1))
            print(f"kept: {found}", flush=True)

        if "rates" not in done:
            keep(rates=rates())
        features, index, out = (str(folder / part) for part in ("features", "index", "bench"))
        if "features" not in done:
            write(Path(features), ClipLike(DIM), num_rows, NUM_TEXTS, np.float16)
            keep(features=True)
        cnclip = [sys.executable, "-m", "pipeline"]
        if "build_seconds" not in done:
            words = [*cnclip, "index", features, index, "--factory", factory, "--recall", str(TARGET)]
            seconds, gib = watch([*words, "--num-queries", str(NUM_TEXTS)])
            keep(build_seconds=seconds, build_peak_gib=gib)
        if "search_peak_gib" not in done:
            words = [*cnclip, "bench-index", features, "--index", index, "--query-side", "text", "--out", out]
            _, gib = watch([*words, "--num-queries", "200"])
            keep(search_peak_gib=gib)
        measured = json.loads((folder / "bench" / "served.json").read_text())
        tuned = next(point for point in measured["points"] if point["is_tuned"])
        description = json.loads((folder / "index" / "index.json").read_text())["search"]
    print(
        f"{num_rows:,} × {DIM} {factory} {tuned['parameters']}: recall {tuned['recall']:.3f} on text queries"
    )
    peak = max(done["build_peak_gib"], done["search_peak_gib"])
    return report(
        record(
            "index_scale/memory",
            peak,
            num_rows * DIM * 4 / 2**30,
            "GiB",
            equal=peak <= LIMIT_GIB and description["reached"],
            rows=num_rows,
            index=f"{factory} {tuned['parameters']}",
            tuned_recall=description["recall"],
            build_seconds=done["build_seconds"],
            build_peak_gib=done["build_peak_gib"],
            search_peak_gib=done["search_peak_gib"],
            bytes_per_vector=measured["facts"]["bytes_per_vector"],
            threads=measured["facts"]["threads"],
            **done["rates"],
            **{key: value for key, value in tuned.items() if key != "parameters"},
        )
    )


if __name__ == "__main__":
    sys.exit(main())
