"""One index of the grid: built once, searched for recall once, and timed in every round."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.index.bench import child
from eval.index.bench.plan import Asked, Plan
from eval.index.bench.points import Point, settings
from eval.index.bench.results import Result, Results
from eval.index.bench.timing import Round
from eval.index.truth import recall_of, recall_of_ann_benchmarks, recall_of_big_ann
from pipeline.core import store
from pipeline.core.config import digest
from pipeline.core.files.foreign import parse_json
from pipeline.core.processes import import_environment
from pipeline.core.records import InputError

_STDERR = "stderr.txt"  # of the process at work
_BUILT = "built.json"  # written when the index is complete
Key = tuple[str, str, int, str]


class Entry:
    """A factory string of the grid, and what is known of it."""

    def __init__(self, plan: Plan, factory: str, copy: int, asked: Sequence[Asked], workplace: Path) -> None:
        """Read nothing and build nothing yet.

        Raises:
            InputError: if FAISS refuses the string.
        """
        self.name = factory if not copy else f"{factory} #{copy + 1}"
        self._plan, self._factory, self._copy = plan, factory, copy
        swept = settings(factory, plan.embeddings.dim, plan.vectors.num_rows)
        self.wanted = [(each, setting) for setting in swept for each in asked]
        self.facts = {each.queries.name: plan.facts(each.queries, factory) for each in asked}
        self.known: dict[Key, Point] = {}
        built_from = plan.facts(asked[0].queries, factory)
        for name in ("k", "searched", "queries", "queries_digest", "num_queries", "labels", "batch"):
            del built_from[name]
        held_out = None if plan.held_out is None else store.digest_bytes(plan.held_out.tobytes())
        self._folder = workplace / digest([built_from, held_out, factory, copy])[:16]

    def key(self, each: Asked, setting: str) -> Key:
        return each.queries.name, self._factory, self._copy, setting

    def take(self, results: Results) -> None:
        """Take what was measured before under the same conditions."""
        for facts in self.facts.values():
            self.known |= {
                point.key: point
                for point in results.of(facts)
                if (point.factory, point.copy) == (self._factory, self._copy)
            }

    def keep(self, point: Point) -> Result:
        """Remember a point, and return it with what it depends on."""
        self.known[point.key] = point
        return Result(self.facts[point.queries], point)

    def results(self) -> list[Result]:
        """Return all points in the order of the sweep."""
        return [self.keep(self.known[self.key(*wanted)]) for wanted in self.wanted]

    def due(self, rounds: int) -> list[tuple[Asked, str]]:
        """Return what was timed in fewer rounds."""
        return [wanted for wanted in self.wanted if len(self.known[self.key(*wanted)].rounds) < rounds]

    def missing(self, rounds: int) -> list[tuple[Asked, str]]:
        """Return what has no recall yet, or is to be exported and has no rows."""
        return [wanted for wanted in self.wanted if self._is_missing(rounds, *wanted)]

    def _is_missing(self, rounds: int, each: Asked, setting: str) -> bool:
        export, known = self._plan.export, self.known.get(self.key(each, setting))
        if known is None:
            return True
        if export is None or self._found(each, setting).exists():
            return False
        return len(known.rounds) < rounds or not export.has(self.name, setting, each.queries)

    def export(self) -> None:
        """Write what each setting found with its speed, unless a run before did."""
        export, vectors = self._plan.export, self._plan.vectors
        for each, setting in self.wanted:
            if export is not None and (path := self._found(each, setting)).exists():
                export.write(self.known[self.key(each, setting)], each.queries, vectors, np.load(path))

    def _found(self, each: Asked, setting: str) -> Path:
        """Return the file of the rows that a setting found, until they are exported."""
        return self._folder / f"found_{digest([self.facts[each.queries.name], setting])[:16]}.npy"

    def searched(self, missing: Sequence[tuple[Asked, str]]) -> Iterator[Point]:
        """Search the index in a process, and yield each point once its recall is known."""
        plan, vectors = self._plan, self._plan.vectors
        built = self._built()
        job = self._job("search", missing)
        with _started(job, self._folder) as process:
            for each, setting in missing:
                answer = _answer(process, job)
                found_QK = np.load(self._folder / child.FOUND)
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it is gone; the next answer says why
                    print(file=process.stdin, flush=True)
                if plan.export is not None:
                    np.save(self._found(each, setting), found_QK)
                k = plan.k
                asking_QD, best_QK = each.queries.vectors_QD, found_QK[:, :k]
                found = recall_of(vectors, asking_QD, best_QK, each.truth)
                has_scores = each.truth.scores_QK is not None
                yield Point(
                    factory=self._factory,
                    parameters=setting,
                    queries=each.queries.name,
                    recall=found.with_ties,
                    strict_recall=found.strict,
                    ann_benchmarks_recall=recall_of_ann_benchmarks(vectors, asking_QD, best_QK, each.truth),
                    big_ann_recall=recall_of_big_ann(best_QK, each.truth) if has_scores else None,
                    recall_error=found.error,
                    queries_per_second=0.0,
                    build_seconds=built["seconds"],
                    bytes_per_vector=built["num_bytes"] / vectors.num_rows,
                    resident_bytes=answer["resident_bytes"],
                    peak_bytes=answer["peak_bytes"],
                    build_peak_bytes=built["peak_bytes"],
                    task=each.task_of(found_QK),
                    distances=answer["distances"],
                    copy=self._copy,
                )

    def timed(self, due: Sequence[tuple[Asked, str]], session: str, number: int) -> Iterator[Point]:
        """Time the index once in a process, and yield each point with that round."""
        self._built()
        job = replace(self._job("time", due), k=self._plan.k)
        with _started(job, self._folder) as process:
            for wanted in due:
                answer = _answer(process, job)
                load = round(os.getloadavg()[0], 2)
                timed = Round(session=session, number=number, load=load, **answer)
                yield self.known[self.key(*wanted)].with_round(timed)

    def _built(self) -> Mapping[str, Any]:
        """Build the index in a process unless it is there, and return its seconds and bytes."""
        built: Mapping[str, Any]
        if (self._folder / _BUILT).exists():
            built = parse_json((self._folder / _BUILT).read_text(encoding="utf-8"))
            return built
        self._folder.mkdir(parents=True, exist_ok=True)
        job = self._job("build", ())
        with _started(job, self._folder) as process:
            built = _answer(process, job)
        store.write_text(str(self._folder / _BUILT), json.dumps(built))
        return built

    def _job(self, do: Any, searches: Sequence[tuple[Asked, str]]) -> child.Job:
        """Return a job, and write the queries and the rows held out that it reads."""
        plan, folder = self._plan, self._folder
        paths = {}
        for number, each in enumerate({each.queries.name: each for each, _ in searches}.values()):
            paths[each.queries.name] = str(folder / f"queries_{number}.npy")
            np.save(paths[each.queries.name], each.queries.vectors_QD)
        held_out = None
        if plan.held_out is not None:
            held_out = str(folder / "held_out.npy")
            np.save(held_out, plan.held_out)
        return child.Job(
            do=do,
            folder=str(folder),
            embeddings=plan.path,
            side=plan.side,
            metric=plan.embeddings.asked_metric,
            held_out=held_out,
            factory=self._factory,
            train_rows=plan.rows_to_train(self._factory),
            centre=plan.centre,
            device=plan.device,
            threads=plan.threads,
            k=plan.searched,
            batch=plan.batch,
            searches=[(paths[each.queries.name], setting) for each, setting in searches],
        )


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
def workplace(out: str | None) -> Iterator[Path]:
    """Yield a folder for the indices, and remove it once all is measured.

    A local `out` keeps it after an interruption, so that finished indices need not be built again.
    """
    if out is not None and store.is_local(out):
        folder = Path(out) / "work"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        store.remove(str(folder))
    else:
        with tempfile.TemporaryDirectory(prefix="bench-index-") as name:
            yield Path(name)
