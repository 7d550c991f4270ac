"""`python -m eval.index.bench.child JOB.json`: builds, searches or times one index in a process of its own.

So its memory is that of one index, and a kill or a crash costs one index. The job's `do` is `build`,
`search` or `time`. A line of JSON on standard output is one result; a search also writes the rows that it
found.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eval.features.layout import Side
from eval.index.bench.timing import distances, reset_counts, time_batches, time_single
from eval.index.build import fill, train
from eval.index.device import Device, to_build, to_device, to_search
from eval.index.embeddings import Embeddings
from eval.index.files import read_limited, write_index
from eval.index.metric import Metric
from eval.index.tuning.parameters import set_parameters
from eval.index.views import Centred, Vectors, mean_of, view_of
from pipeline.core.files.foreign import parse_json
from pipeline.core.processes import die_with_parent
from pipeline.core.records import ConfigError, InputError

INDEX, MEAN, FOUND = "index", "mean.npy", "found.npy"
REFUSED = 3  # exit status if FAISS refuses the factory


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One index to build or search."""

    do: Literal["build", "search", "time"]
    folder: str  # where the index and the results lie
    embeddings: str
    side: Side
    metric: Metric | None  # as `Embeddings.open` takes it
    held_out: str | None  # .npy of the rows that are left out, ascending
    factory: str
    train_rows: int
    centre: bool
    device: Device
    threads: int
    k: int = 10
    batch: int | None = None  # queries in one call of a timed search; None: all
    searches: Sequence[tuple[str, str]] = field(default_factory=tuple)  # (.npy of queries, parameters)


def write_job(path: Path, job: Job) -> None:
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")


def build(job: Job) -> None:
    """Train and fill an index, and write it into the folder."""
    held_out = None if job.held_out is None else np.load(job.held_out)
    vectors: Vectors = view_of(Embeddings.open(job.embeddings, side=job.side, metric=job.metric), held_out)
    start = time.perf_counter()
    if job.centre:
        mean_D = mean_of(vectors, job.train_rows)
        np.save(Path(job.folder) / MEAN, mean_D)
        vectors = Centred(vectors, mean_D)
    empty = train(vectors, job.factory, job.train_rows, to_build(job.device))
    index = fill(empty, vectors, 0, vectors.num_rows, job.factory, to_build(job.device))
    seconds = time.perf_counter() - start
    num_bytes, _ = write_index(index, str(Path(job.folder) / INDEX))
    _say({"seconds": seconds, "num_bytes": num_bytes, "peak_bytes": _memory("VmHWM")})


def search(job: Job) -> None:
    """Load the index, and search or time it with each setting."""
    queries = {path: np.load(path) for path, _ in job.searches}
    path = Path(job.folder) / INDEX
    before = _memory("VmRSS")
    loaded = read_limited(str(path), path.stat().st_size, mapped=False)
    resident = _memory("VmRSS") - before
    device = to_search(job.device, job.factory)
    index = to_device(loaded, device, job.factory)
    for name, parameters in job.searches:
        set_parameters(index, parameters, device)
        queries_QD = queries[name]
        if job.do == "time":
            speed, cpu_ms = time_batches(index.search, queries_QD, job.k, job.batch or len(queries_QD))
            single = time_single(index.search, queries_QD, job.k)
            _say({"queries_per_second": speed, "cpu_ms": cpu_ms, "latencies_us": single})
            continue
        reset_counts()
        _, found_QK = index.search(queries_QD, job.k)
        compared = distances(loaded, len(queries_QD), job.k) if device == "cpu" else None
        np.save(Path(job.folder) / FOUND, found_QK)
        peak = max(0, _memory("VmHWM") - before)
        _say({"resident_bytes": max(0, resident), "peak_bytes": peak, "distances": compared})
        if not sys.stdin.readline():  # the parent has taken what was found
            return


def _memory(name: str) -> int:
    """Return a number of bytes from /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")


def _say(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


def main(path: str) -> int:
    import faiss

    job = Job(**parse_json(Path(path).read_text(encoding="utf-8")))
    faiss.omp_set_num_threads(job.threads)
    try:
        {"build": build, "search": search, "time": search}[job.do](job)
    except (InputError, ConfigError) as error:
        _say({"refused": str(error)})
        return REFUSED
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1]))
