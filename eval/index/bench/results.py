"""`results.jsonl`: what was measured, a line for each point, with all that it depends on.

A line is written as soon as its point is measured, and again with each round of its timing, so a kill loses
one setting of one round. Lines of other machines and settings stay in the file.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from eval.index.bench.front import pareto_front
from eval.index.bench.points import Point
from eval.index.bench.timing import Round
from eval.metrics.bootstrap import Measured
from pipeline.core import store
from pipeline.core.files.foreign import foreign, parse_json
from pipeline.core.records import InputError
from pipeline.core.text_table import align

RESULTS = "results.jsonl"
_REMEDY = "remove the line, or give another --out"


@dataclass(frozen=True, slots=True)
class Result:
    """A point, and what it depends on."""

    facts: Mapping[str, Any]  # equal facts make two points comparable
    point: Point

    def to_json(self) -> str:
        point = asdict(self.point)
        del point["gap"]  # of two points, so it is computed from both
        return json.dumps({"facts": self.facts, **point}, ensure_ascii=False)


class Results:
    """The results of one folder, or of this process if there is no folder."""

    def __init__(self, folder: str | None) -> None:
        """Read what the folder has.

        Raises:
            InputError: for a line that is no result.
        """
        self._path = None if folder is None else store.join(folder, RESULTS)
        self._all = read_results(self._path) if self._path is not None and store.exists(self._path) else []

    def of(self, facts: Mapping[str, Any]) -> list[Point]:
        """Return the points with these facts."""
        return [result.point for result in self._all if result.facts == facts]

    def add(self, result: Result) -> None:
        """Add a point or replace it, and write it to the disk."""
        for place, known in enumerate(self._all):
            if known.facts == result.facts and known.point.key == result.point.key:
                self._all[place] = result
                break
        else:
            self._all.append(result)
        if self._path is not None:
            store.write_text(self._path, "".join(result.to_json() + "\n" for result in self._all))


def read_results(path: str) -> list[Result]:
    """Read a file of results.

    Raises:
        InputError: for a missing file, and for a line that is no result; it names file and line.
    """
    found = []
    with foreign(path, "file of results", _REMEDY):
        lines = store.read_text(path).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            facts, task = record.pop("facts"), record.pop("task")
            measured = None if task is None else {name: Measured(**one) for name, one in task.items()}
            rounds = tuple(Round(**one) for one in record.pop("rounds", ()))
            point = Point(**record, task=measured, rounds=rounds)
            numbers = [getattr(point, field.name) for field in fields(Point) if field.type in (int, float)]
            if not isinstance(facts, dict) or not all(isinstance(value, int | float) for value in numbers):
                raise ValueError("facts and numbers are missing")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}:{number}: not a result ({error}); {_REMEDY}") from None
        found.append(Result(facts, point))
    return found


def machine() -> dict[str, Any]:
    """Return the processor, the cores of this process, and FAISS's version."""
    import faiss

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name
            )
    except OSError:
        pass
    return {"processor": name, "cores": len(os.sched_getaffinity(0)), "faiss": faiss.__version__}


def compared(results: Sequence[Result]) -> str:
    """Return aligned text of results of several runs and machines, with a star on their Pareto front."""
    results = [result for result in results if result.point.queries_per_second > 0]  # killed before
    front = pareto_front([result.point for result in results])
    head = (
        "",
        "factory",
        "setting",
        "queries",
        "recall",
        "queries/s",
        "bytes/vector",
        "rows",
        "k",
        "threads",
        "where",
    )
    rows: list[tuple[str, ...]] = [head]
    for result in results:
        point, facts = result.point, result.facts
        rows.append(
            (
                "*" if point in front else "",
                point.name + (" centred" if facts.get("centred") else ""),
                point.parameters,
                point.queries,
                f"{point.recall:.4f}",
                f"{point.queries_per_second:,.0f}",
                f"{point.bytes_per_vector:.1f}",
                f"{facts.get('num_rows', 0):,}",
                str(facts.get("k", "")),
                str(facts.get("threads", "")),
                f"{facts.get('processor', '')}, faiss {facts.get('faiss', '')}",
            )
        )
    return align(rows, (False,) * 4 + (True,) * 6 + (False,))
