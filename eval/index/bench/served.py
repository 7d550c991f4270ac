"""Measures an index in parts as `cnclip serve` and `cnclip.Index` search it: memory-mapped, cold and warm.

`python -m eval.index.bench.served JOB.json` is the process that searches, so that its memory is the index's.
Cold is the first search after the parts have left the page cache; on a disk that other programs use at the
same time some of them may come back.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.index.bench.energy import UNKNOWN, Meter, counters
from eval.index.bench.points import settings
from eval.index.bench.results import machine
from eval.index.bench.timing import (
    PERCENTILES,
    check_timing,
    percentile_ms,
    spread_of,
    time_batches,
    time_single,
)
from eval.index.embeddings import Embeddings
from eval.index.partitioned import PartedIndex
from eval.index.parts.selection import Mask
from eval.index.truth import Truth, exact_neighbours, recall_of, without_own
from eval.index.tuning.queries import Queries
from eval.index.views import Vectors, Without, rows_without
from pipeline.core import store
from pipeline.core.files.foreign import parse_json
from pipeline.core.processes import die_with_parent, import_environment
from pipeline.core.records import InputError
from pipeline.core.text_table import align

_NO_MORE = 0.0005  # recall that four times the effort has to add; else more effort adds nothing either
_FOUND, _QUERIES, _ROWS = "found_{}.npy", "queries.npy", "rows.npy"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPoint:
    """The index with one setting of its search parameters. Times are milliseconds for one query."""

    parameters: str
    is_tuned: bool  # what every search uses that names no other
    recall: float  # rows as near as the k-th count
    strict_recall: float
    cold_first_ms: float  # the first query, with opening the parts
    p50_ms: float | None  # one query at a time, warm; None for too few queries
    p95_ms: float | None
    p99_ms: float | None
    queries_per_second: float  # in batches, median of the rounds
    spread: float | None  # half the middle half of the rounds' speeds, as a share of their median
    cpu_ms: float  # of all threads for one query in a batch
    joules_per_query: float | None  # of the whole machine, in batches; None without counters
    proportional_bytes: int  # growth of the process's proportional set size, mapped pages included


@dataclass(frozen=True, slots=True)
class Served:
    """What was measured."""

    facts: dict[str, Any]
    points: list[ServedPoint]


def measure_served(
    folder: str,
    embeddings: Embeddings,
    queries: Queries,
    k: int,
    allowed: Mask | None,
    threads: int,
    batch: int | None,
    rounds: int,
    out: str | None,
    say: Callable[[str], None],
) -> Served:
    """Search an index with its tuned parameters and a sweep of others.

    The sweep of one parameter ends early if four times the effort finds no more.

    Args:
        folder: the index.
        embeddings: the features that it holds.
        queries: what is searched for; rows of the index do not count as their own answers.
        k: neighbours of each.
        allowed: which rows may answer; None for all.
        threads: of FAISS.
        batch: queries in one call; None for all.
        rounds: how often each setting is timed.
        out: folder that gets `served.json`, or None.
        say: gets a line for each setting.

    Raises:
        InputError: if the features are not those of the index, or too few rows may answer.
        ConfigError: for fewer than 2 rounds, or an empty batch.
    """
    check_timing(rounds, batch)
    index = PartedIndex.open(folder)
    if (embeddings.num_rows, embeddings.dim) != (index.num_rows, index.dim):
        raise InputError(
            f"{folder}: the features with {embeddings.paths[0]} have {embeddings.num_rows} rows, but the"
            f" index has {index.num_rows} of width {index.dim}: it is of other features"
        )
    mask_N = np.ones(index.num_rows, np.bool_) if allowed is None else allowed.copy()
    mask_N[index.removed_rows()] = False
    asked = k + queries.are_own
    left_out = np.flatnonzero(~mask_N)
    view: Vectors = Without(embeddings, left_out) if len(left_out) else embeddings
    if asked > view.num_rows:
        raise InputError(
            f"{folder}: {view.num_rows} rows may answer, fewer than the {asked} that are asked for"
        )
    truth = Truth(rows_without(left_out, exact_neighbours(view, queries.vectors_QD, asked).rows_QK))
    if queries.are_own:
        truth = without_own(truth, queries.rows_Q)
    tuned = "" if index.tuned is None else index.tuned.parameters
    swept = list(dict.fromkeys([tuned, *settings(index.factory, index.dim, index.num_rows)]))
    facts = {
        "index": folder,
        "factory": index.factory,
        "num_parts": len(index.parts),
        "num_rows": index.num_rows,
        "bytes_per_vector": index.bytes_per_vector,
        "share": float(mask_N.mean()),
        "k": k,
        "queries": queries.source,
        "num_queries": len(queries),
        "threads": threads,
        "batch": len(queries) if batch is None else min(batch, len(queries)),
        "rounds": rounds,
        **machine(),
    }
    points = []
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-index-"))
        np.save(Path(name) / _QUERIES, queries.vectors_QD)
        if allowed is not None:
            np.save(Path(name) / _ROWS, allowed)
        job = {"folder": folder, "swept": swept, "k": asked, "threads": threads, "work": name}
        answers = stack.enter_context(
            contextlib.closing(_searched(job | {"batch": facts["batch"], "rounds": rounds}))
        )
        for number, (parameters, answer) in enumerate(zip(swept, answers, strict=True)):
            found_QK = np.load(Path(name) / _FOUND.format(number))
            if queries.are_own:
                found_QK = without_own(Truth(found_QK), queries.rows_Q).rows_QK
            recall = recall_of(embeddings, queries.vectors_QD, found_QK, truth)
            point = ServedPoint(
                parameters=parameters,
                is_tuned=parameters == tuned,
                recall=recall.with_ties,
                strict_recall=recall.strict,
                **answer,
            )
            say(
                f"{parameters or 'no parameters'}: recall {point.recall:.3f}, cold {point.cold_first_ms:.1f}"
                f" ms, then {point.queries_per_second:,.0f} queries/s"
            )
            points.append(point)
            if out is not None:
                body = {"facts": facts, "points": [asdict(each) for each in points]}
                store.write_text(store.join(out, "served.json"), json.dumps(body, indent=1))
            if number > 1 and "," not in parameters and recall.with_ties <= points[-2].recall + _NO_MORE:
                say(f"{parameters}: finds no more than {points[-2].parameters}, so the sweep ends")
                break
    return Served(facts, points)


def served_table(served: Served) -> str:
    """Return aligned text; "tuned" marks the parameters that searches use."""
    facts = served.facts
    head = (
        "",
        "setting",
        f"recall@{facts['k']}",
        "strict",
        "cold ms",
        "p50 ms",
        "p95",
        "p99",
        "queries/s",
        "spread",
        "CPU ms",
        "MiB",
        "J/query",
    )
    rows: list[tuple[str, ...]] = [head]
    for point in served.points:
        times = (point.p50_ms, point.p95_ms, point.p99_ms)
        rows.append(
            (
                "tuned" if point.is_tuned else "",
                point.parameters,
                f"{point.recall:.4f}",
                f"{point.strict_recall:.4f}",
                f"{point.cold_first_ms:.1f}",
                *("" if one is None else f"{one:.3f}" for one in times),
                f"{point.queries_per_second:,.0f}",
                "" if point.spread is None else f"±{point.spread:.0%}",
                f"{point.cpu_ms:.3f}",
                f"{point.proportional_bytes / 2**20:.0f}",
                "" if point.joules_per_query is None else f"{point.joules_per_query:.4f}",
            )
        )
    size = f"{facts['bytes_per_vector']:.1f} bytes per vector"
    share = f"{facts['share']:.1%} of {facts['num_rows']:,} rows may answer"
    text = f"{facts['index']}: {facts['factory']} in {facts['num_parts']} parts, {size}, {share}\n"
    text += align(rows, (False, False, *[True] * 11))
    if all(point.joules_per_query is None for point in served.points):
        text += f"\nno J/query: {UNKNOWN}"
    return text


def _searched(job: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Yield what another process measures with each setting."""
    work = Path(job["work"])
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    with (
        open(work / "stderr.txt", "w+b") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "eval.index.bench.served", str(work / "job.json")],
            env={**os.environ, **import_environment()},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for _ in job["swept"]:
                line = process.stdout.readline()
                if not line:
                    status = process.wait()
                    said = (work / "stderr.txt").read_text(encoding="utf-8", errors="replace").splitlines()
                    reason = said[-1] if said else f"status {status}"
                    raise InputError(f"{job['folder']}: the process that was to search it ended: {reason}")
                yield parse_json(line)
        finally:
            process.kill()


def search(job: dict[str, Any], number: int) -> dict[str, float | None]:
    """Search cold, then write what is found, and time batches and single queries in rounds."""
    work, k = Path(job["work"]), job["k"]
    queries_QD = np.load(work / _QUERIES)
    rows = np.load(work / _ROWS) if (work / _ROWS).exists() else None
    index = PartedIndex.read(job["folder"])
    for part in index.parts:
        _out_of_cache(store.join(job["folder"], part.path))
    before = _proportional()
    find = partial(index.search, parameters=job["swept"][number], rows=rows)
    start = time.perf_counter()
    find(queries_QD[:1], k)
    cold = time.perf_counter() - start
    np.save(work / _FOUND.format(number), find(queries_QD, k)[1])
    speeds, cpu_ms, single, joules = list[float](), list[float](), list[int](), list[float]()
    for _ in range(job["rounds"]):
        meter, start = Meter(counters()), time.perf_counter()
        speed, cpu = time_batches(find, queries_QD, k, job["batch"])
        used, seconds = meter.joules(), time.perf_counter() - start
        speeds.append(speed)
        cpu_ms.append(cpu)
        single += time_single(find, queries_QD, k)
        if used is not None:
            joules.append(used / seconds / speed)
    return {
        "cold_first_ms": 1e3 * cold,
        **{f"p{percentile}_ms": percentile_ms(single, percentile) for percentile in PERCENTILES},
        "queries_per_second": statistics.median(speeds),
        "spread": spread_of(speeds),
        "cpu_ms": statistics.median(cpu_ms),
        "joules_per_query": statistics.median(joules) if joules else None,
        "proportional_bytes": max(0, _proportional() - before),
    }


def _out_of_cache(path: str) -> None:
    """Ask the kernel to drop a file from the page cache."""
    if store.is_local(path):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _proportional() -> int:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(text.split("\nPss:")[1].split()[0]) << 10


def main(words: Sequence[str]) -> int:
    import faiss

    job = parse_json(Path(words[1]).read_text(encoding="utf-8"))
    faiss.omp_set_num_threads(job["threads"])
    for number in range(len(job["swept"])):
        print(json.dumps(search(job, number)), flush=True)
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv))
