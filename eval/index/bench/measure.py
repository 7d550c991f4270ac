"""Measures a grid of indices, each in processes of its own, and keeps every result at once.

For each factory string, each setting of its search parameters and each set of queries: recall at k against
exact search, queries per second, seconds to build, bytes per vector and memory.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.features.layout import Side
from eval.index.bench import child
from eval.index.bench.points import Point, settings, with_gaps
from eval.index.bench.results import Result, Results, machine
from eval.index.bench.task import K as TASK_K
from eval.index.bench.task import Labels, ranks, task_recall
from eval.index.build import rows_to_train
from eval.index.device import Device, check_device
from eval.index.embeddings import Embeddings
from eval.index.formats.export import Export
from eval.index.truth import Truth, check_truth, exact_neighbours, read_truth, recall_of, write_truth
from eval.index.tuning.queries import Queries
from eval.index.views import Without
from eval.metrics.bootstrap import Measured
from eval.metrics.recall import Positives
from pipeline.core import store
from pipeline.core.arrays import Int64Array
from pipeline.core.config import digest
from pipeline.core.files.foreign import parse_json
from pipeline.core.processes import import_environment
from pipeline.core.records import ConfigError, InputError

_STDERR = "stderr.txt"  # of the process at work


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure on which features.

    Raises:
        InputError: if there are fewer rows than k, besides those that are held out.
    """

    path: str  # of the features
    side: Side
    embeddings: Embeddings
    queries: Sequence[Queries]
    k: int
    train_rows: int | None  # None: enough for each factory
    centre: bool = False
    device: Device = "cpu"
    threads: int
    labels: Labels | None = None
    truth_path: str | None = None  # a file with the exact neighbours of the only set of queries
    export: Export | None = None  # also writes what each setting found

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.centre and self.embeddings.metric == "l2":
            raise ConfigError("--centre is for inner products; distances do not change when rows are moved")
        if not 0 < self.k <= self.vectors.num_rows:
            raise InputError(f"{self.path}: k = {self.k}, but there are {self.vectors.num_rows} rows")

    @property
    def held_out(self) -> Int64Array | None:
        """Return the rows that are queries and not indexed."""
        return next((queries.rows_Q for queries in self.queries if queries.are_own), None)

    @property
    def vectors(self) -> Embeddings | Without:
        return child.view_of(self.embeddings, self.held_out)

    @property
    def searched(self) -> int:
        """Return how many neighbours are searched: those of the task are 10 at least."""
        return self.k if self.labels is None else min(max(self.k, TASK_K), self.vectors.num_rows)

    def facts(self, queries: Queries, factory: str) -> dict[str, Any]:
        """Return what a result depends on besides the factory and its setting."""
        return {
            "k": self.k,
            "searched": self.searched,
            "queries": queries.source,
            "queries_digest": queries.digest,
            "num_queries": len(queries),
            "embeddings_digest": self.embeddings.digest(),
            "num_rows": self.vectors.num_rows,
            "held_out": 0 if self.held_out is None else len(self.held_out),
            "dim": self.embeddings.dim,
            "metric": self.embeddings.metric,
            "train_rows": self.rows_to_train(factory),
            "centred": self.centre,
            "device": self.device,
            "threads": self.threads,
            "labels": None if self.labels is None else store.digest_file(self.labels.path),
            **machine(),
        }

    def rows_to_train(self, factory: str) -> int:
        return rows_to_train(self.embeddings.dim, factory) if self.train_rows is None else self.train_rows


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything that was measured."""

    points: list[Point]
    results: list[Result]  # the same, with what they depend on
    exact: dict[str, dict[str, Measured]]  # the task's recall of exact search, by set of queries


@dataclass(frozen=True, slots=True)
class _Asked:
    """A set of queries with its exact neighbours and its labels."""

    queries: Queries
    truth: Truth
    labelled: tuple[Int64Array, Positives] | None

    def task_of(self, rows_QK: Int64Array) -> dict[str, Measured] | None:
        if self.labelled is None:
            return None
        numbers, positives = self.labelled
        return task_recall(ranks(rows_QK[numbers], positives))


def measure(plan: Plan, grid: Sequence[str], out: str | None, say: Callable[[str], None]) -> Measurement:
    """Build and sweep every factory string.

    Strings that FAISS refuses at this size are reported and left out. Results that `out` has are not measured
    again.

    Raises:
        InputError: if FAISS refuses all strings.
    """
    results = Results(out)
    asked = [_asked(plan, queries, out, say) for queries in plan.queries]
    measured = list[Result]()
    with _workplace(out) as folder:
        for factory in grid:
            try:
                measured += _measure_factory(plan, factory, asked, results, folder, say)
            except InputError as error:
                say(f"left out: {error}")
    if not measured:
        raise InputError("FAISS can build none of the grid's factory strings here")
    exact = {
        each.queries.name: task for each in asked if (task := each.task_of(each.truth.rows_QK)) is not None
    }
    return Measurement(with_gaps([result.point for result in measured]), measured, exact)


def _asked(plan: Plan, queries: Queries, out: str | None, say: Callable[[str], None]) -> _Asked:
    """Return a set of queries with its exact neighbours, from a file if there is one."""
    vectors, k = plan.vectors, plan.searched
    if plan.truth_path is not None:
        num_queries = int(queries.rows_Q.max()) + 1
        truth = read_truth(plan.truth_path, num_queries=num_queries, num_rows=vectors.num_rows, k=k)
        truth = truth.of(queries.rows_Q)
        check_truth(plan.truth_path, vectors, queries.vectors_QD, truth)
    else:
        held_out = None if plan.held_out is None else store.digest_bytes(plan.held_out.tobytes())
        bound = digest(plan.embeddings.digest(), held_out, queries.digest, k)
        path = None if out is None else store.join(out, "ground_truth", f"{bound[:16]}.ibin")
        if path is not None and store.exists(path):
            truth = read_truth(path, num_queries=len(queries), num_rows=vectors.num_rows, k=k)
        else:
            say(f"exact neighbours of {queries.source}")
            truth = exact_neighbours(vectors, queries.vectors_QD, k, plan.device)
            if path is not None:
                write_truth(path, truth)
    labels = None if plan.labels is None or queries.are_own else plan.labels.of(queries)
    if labels is not None and isinstance(vectors, Without):
        numbers, positives = labels
        labels = numbers, replace(positives, rows=vectors.moved(positives.rows))
    return _Asked(queries, truth, labels)


def _measure_factory(
    plan: Plan,
    factory: str,
    asked: Sequence[_Asked],
    results: Results,
    folder: Path,
    say: Callable[[str], None],
) -> list[Result]:
    """Return the results of one factory string: those that are known, and the rest measured."""
    swept = settings(factory, plan.embeddings.dim, plan.vectors.num_rows)
    facts = {each.queries.name: plan.facts(each.queries, factory) for each in asked}
    known = {
        (point.queries, point.parameters): point
        for each in asked
        for point in results.of(facts[each.queries.name])
        if point.factory == factory
        and (plan.export is None or plan.export.has(factory, point.parameters, each.queries))
    }
    wanted = [(each, setting) for setting in swept for each in asked]
    missing = [(each, setting) for each, setting in wanted if (each.queries.name, setting) not in known]
    if missing:
        for point in _searched(plan, factory, missing, folder):
            say(
                f"{f'{factory} {point.parameters}'.strip()}, {point.queries}: recall {point.recall:.3f},"
                f" {point.queries_per_second:,.0f} queries/s"
            )
            known[point.queries, point.parameters] = point
            results.add(Result(facts[point.queries], point))
    else:
        say(f"{factory}: measured before")
    return [Result(facts[each.queries.name], known[each.queries.name, setting]) for each, setting in wanted]


def _searched(
    plan: Plan, factory: str, missing: Sequence[tuple[_Asked, str]], folder: Path
) -> Iterator[Point]:
    """Build an index in one process, search it in another, and yield each point once it is measured."""
    paths = {}
    for number, each in enumerate({each.queries.name: each for each, _ in missing}.values()):
        paths[each.queries.name] = str(folder / f"queries_{number}.npy")
        np.save(paths[each.queries.name], each.queries.vectors_QD)
    held_out = None
    if plan.held_out is not None:
        held_out = str(folder / "held_out.npy")
        np.save(held_out, plan.held_out)
    job = child.Job(
        do="build",
        folder=str(folder),
        embeddings=plan.path,
        side=plan.side,
        metric=plan.embeddings.asked_metric,
        held_out=held_out,
        factory=factory,
        train_rows=plan.rows_to_train(factory),
        centre=plan.centre,
        device=plan.device,
        threads=plan.threads,
    )
    with _started(job, folder) as process:
        built = _answer(process, job)
    searches = [(paths[each.queries.name], setting) for each, setting in missing]
    job = replace(job, do="search", k=plan.searched, searches=searches)
    vectors = plan.vectors
    with _started(job, folder) as process:
        for each, setting in missing:
            answer = _answer(process, job)
            found_QK = np.load(folder / child.FOUND)
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            if plan.export is not None:
                plan.export.write(factory, setting, each.queries, vectors, found_QK, answer, built)
            recall = recall_of(vectors, each.queries.vectors_QD, found_QK[:, : plan.k], each.truth)
            yield Point(
                factory=factory,
                parameters=setting,
                queries=each.queries.name,
                recall=recall.with_ties,
                strict_recall=recall.strict,
                queries_per_second=answer["queries_per_second"],
                build_seconds=built["seconds"],
                bytes_per_vector=built["num_bytes"] / vectors.num_rows,
                resident_bytes=answer["resident_bytes"],
                peak_bytes=answer["peak_bytes"],
                build_peak_bytes=built["peak_bytes"],
                task=each.task_of(found_QK),
            )
    (folder / child.INDEX).unlink()


@contextlib.contextmanager
def _started(job: child.Job, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run a job in another process; end it if this block ends early."""
    child.write_job(folder / "job.json", job)
    with (
        open(folder / _STDERR, "wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "eval.index.bench.child", str(folder / "job.json")],
            env={**os.environ, **import_environment()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _answer(process: "subprocess.Popen[str]", job: child.Job) -> Mapping[str, Any]:
    """Return the next result of a job.

    Raises:
        InputError: if it has none: FAISS refuses the factory, or the process ended.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if line:
        answer: Mapping[str, Any] = parse_json(line)
        if "refused" in answer:
            raise InputError(answer["refused"])
        return answer
    status = process.wait()
    said = (Path(job.folder) / _STDERR).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = f"signal {-status}" if status < 0 else (said[-1] if said else f"status {status}")
    raise InputError(f"{job.factory}: the process that was to {job.do} the index ended by {reason}")


@contextlib.contextmanager
def _workplace(out: str | None) -> Iterator[Path]:
    """Yield a folder for one index at a time, in `out` if that is local, and remove it in the end."""
    if out is not None and store.is_local(out):
        store.remove(store.join(out, "work"))  # of a run that was killed
        folder = Path(out) / "work"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            store.remove(str(folder))
    else:
        with tempfile.TemporaryDirectory(prefix="bench-index-") as name:
            yield Path(name)
