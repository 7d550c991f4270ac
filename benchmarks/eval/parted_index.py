"""What an index in 20 parts costs: time over one FAISS index, rows appended, searches of some rows only.

Texts ask for clip-like images (`clip_like.py`). Default: 60,000 × 256; `--full` takes 1 million × 512.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import faiss
import numpy as np

from benchmarks.eval.clip_like import ClipLike
from benchmarks.harness import parse, parser, record, report
from eval.index.build import fill
from eval.index.embeddings import Embeddings
from eval.index.files import load_index
from eval.index.partitioned import PartedIndex, build_parts
from eval.index.parts.change import append_grown
from eval.index.truth import exact_neighbours
from eval.index.tuning.parameters import set_parameters
from eval.index.tuning.queries import queries_of_array
from eval.index.tuning.tune import Tuning
from eval.index.views import Without, rows_without

NUM_PARTS, K, NUM_TEXTS, ROUNDS = 20, 10, 400, 5
TARGET = 0.9
SHARES = (0.01, 0.1, 0.5)
LIMIT_MS, LIMIT_SHARE = 1.0, 0.02


def milliseconds_in_turns(searches: Mapping[str, Callable[[Any], Any]], texts_QD: Any) -> dict[str, float]:
    """Return the milliseconds of one query at a time: the median of queries, each in its fastest round.

    The searches take turns. Other work on the machine only ever adds to a query's time.
    """
    taken: dict[str, list[list[float]]] = {name: [] for name in searches}
    for _ in range(ROUNDS):
        for times in taken.values():
            times.append([])
        for row in range(0, len(texts_QD), 4):
            for name, search in searches.items():
                start = time.perf_counter()
                search(texts_QD[row : row + 1])
                taken[name][-1].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(np.min(times, axis=0))) for name, times in taken.items()}


def main() -> int:
    made = parser(__doc__, full="1 million × 512")
    made.add_argument("--lists", type=int, default=256)
    made.add_argument("--codes", default="SQ8", help="of the rows in the lists, such as PQ128x4fsr,RFlat")
    options = parse(made)
    num_rows, dim = (1_000_000, 512) if options.full else (60_000, 256)
    like, factory = ClipLike(dim), f"IVF{options.lists},{options.codes}"
    faiss.omp_set_num_threads(1)
    texts_QD = like.texts(NUM_TEXTS, num_rows)
    results = []
    with tempfile.TemporaryDirectory() as name:
        features, folder = Path(name) / "img_emb", str(Path(name) / "index")
        features.mkdir()
        np.save(features / "img_emb_0.npy", like.images(0, num_rows))
        rows = Embeddings.open(name)
        start = time.process_time()
        tuning = Tuning(queries_of_array(texts_QD[::2], rows), TARGET)
        train_rows = min(num_rows, 39 * options.lists * 2)
        per_part = -(-num_rows // NUM_PARTS)
        build_parts(
            rows, folder, factory=factory, rows_per_part=per_part, train_rows=train_rows, tuning=tuning
        )
        build_seconds = time.process_time() - start
        index = PartedIndex.open(folder)
        assert index.tuned is not None
        parameters = index.tuned.parameters
        whole = fill(load_index(f"{folder}/trained.index", mapped=False), rows, 0, num_rows, factory, "cpu")
        # Every part refines its own best rows, so the one index gets as many of them to refine.
        set_parameters(
            whole, re.sub(r"(?<=k_factor_rf=)\d+", lambda n: str(int(n[0]) * NUM_PARTS), parameters)
        )
        found, once = index.search(texts_QD, K)[1], whole.search(texts_QD, K)[1]
        same = np.mean([len(np.intersect1d(*pair)) / K for pair in zip(found, once, strict=True)])
        times = milliseconds_in_turns(
            {"ours": lambda query: index.search(query, K), "faiss": lambda query: whole.search(query, K)},
            texts_QD,
        )
        more = times["ours"] - times["faiss"]
        print(f"one query: {times['ours']:.3f} ms over 20 parts, {times['faiss']:.3f} ms in one FAISS index")
        results.append(
            record(
                f"parted_index/query@{options.codes}",
                times["ours"],
                times["faiss"],
                "ms",
                equal=bool(more <= LIMIT_MS and same > 0.97),
                same_rows=float(same),
                parts=len(index.parts),
                rows=num_rows,
                setting=f"{factory} {parameters}",
            )
        )
        recalls: dict[str, float] = {}
        rng = np.random.default_rng(5)
        for share in (*SHARES, 1.0):
            mask = rng.random(num_rows) < share if share < 1 else np.ones(num_rows, np.bool_)
            left_out = np.flatnonzero(~mask)
            exact = exact_neighbours(Without(rows, left_out), texts_QD[1::2], K)
            wanted = rows_without(left_out, exact.rows_QK)
            found = index.search(texts_QD[1::2], K, rows=None if share == 1 else mask)[1]
            hits = [len(np.intersect1d(a, b)) for a, b in zip(wanted, found, strict=True)]
            recalls[f"{share:.0%}"] = float(np.mean(hits)) / K
        print("recall if so many rows may answer: " + json.dumps(recalls))
        results.append(
            record(
                f"parted_index/filtered@{options.codes}",
                min(recalls[f"{share:.0%}"] for share in SHARES),
                recalls["100%"],
                "recall",
                equal=min(recalls.values()) >= recalls["100%"] - 0.02,
                recalls=recalls,
            )
        )
        np.save(features / "img_emb_1.npy", like.images(num_rows, num_rows + num_rows // 100))
        start = time.process_time()
        append_grown(Embeddings.open(name), folder)
        append_seconds = time.process_time() - start
        print(f"1% appended in {append_seconds:.3f} CPU s, built in {build_seconds:.1f}")
        results.append(
            record(
                f"parted_index/append@{options.codes}",
                append_seconds,
                build_seconds,
                "CPU s",
                equal=append_seconds <= LIMIT_SHARE * build_seconds,
            )
        )
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
