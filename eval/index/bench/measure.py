"""Measures a grid of indices, each in processes of its own, and keeps every result at once.

For each factory string, each setting of its search parameters and each set of queries: recall at k against
exact search, speed in rounds over all indices, seconds to build, bytes per vector and memory.
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from eval.index.bench.entry import Entry, workplace
from eval.index.bench.plan import Plan, ask
from eval.index.bench.points import Point, with_gaps
from eval.index.bench.results import Result, Results
from eval.metrics.bootstrap import Measured
from pipeline.core.records import InputError


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything that was measured."""

    points: list[Point]
    results: list[Result]  # the same, with what they depend on
    exact: dict[str, dict[str, Measured]]  # the task's recall of exact search, by set of queries


def measure(plan: Plan, grid: Sequence[str], out: str | None, say: Callable[[str], None]) -> Measurement:
    """Build and sweep every factory string, then time all of them in rounds.

    Strings that FAISS refuses at this size are reported and left out. Results that `out` has are not measured
    again. A string that is listed twice is measured twice.

    Raises:
        InputError: if FAISS refuses all strings.
    """
    results = Results(out)
    asked = [ask(plan, queries, out, say) for queries in plan.queries]
    entries = list[Entry]()
    with workplace(out) as folder:
        for place, factory in enumerate(grid):
            try:
                entry = Entry(plan, factory, list(grid[:place]).count(factory), asked, folder)
                _sweep(plan.rounds, entry, results, say)
                entries.append(entry)
            except InputError as error:
                say(f"left out: {error}")
        if not entries:
            raise InputError("FAISS can build none of the grid's factory strings here")
        _time(plan.rounds, entries, results, say)
        for entry in entries:
            entry.export()
    measured = [result for entry in entries for result in entry.results()]
    exact = {
        each.queries.name: task for each in asked if (task := each.task_of(each.truth.rows_QK)) is not None
    }
    return Measurement(with_gaps([result.point for result in measured]), measured, exact)


def _sweep(rounds: int, entry: Entry, results: Results, say: Callable[[str], None]) -> None:
    """Measure the recall of all settings of an index that `results` does not have."""
    entry.take(results)
    missing = entry.missing(rounds)
    if not missing:
        say(f"{entry.name}: measured before")
        return
    for point in entry.searched(missing):
        if point.key in entry.known:  # with its rounds; only the export lacked what it finds
            continue
        say(f"{f'{point.name} {point.parameters}'.strip()}, {point.queries}: recall {point.recall:.3f}")
        results.add(entry.keep(point))


def _time(rounds: int, entries: Sequence[Entry], results: Results, say: Callable[[str], None]) -> None:
    """Time all settings of all indices in rounds, every other one backwards."""
    session = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}Z {socket.gethostname()} {os.getpid()}"
    for number in range(rounds):
        for entry in entries if number % 2 == 0 else reversed(entries):
            due = entry.due(rounds)
            for point in entry.timed(due, session, number) if due else ():
                results.add(entry.keep(point))
            if due:
                say(f"round {number + 1} of {rounds}: {entry.name}, load {os.getloadavg()[0]:.1f}")
