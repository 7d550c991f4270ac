"""What a run is doing now, from its folder: receipts, notes on failed tasks, and the figures of its machines.

Nothing is asked of the processes of the run, so it may be watched from any machine that sees its folder.
"""

import json
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from data_prep.download.figures import CallFigures
from data_prep.download.tally import FETCHED, Tallies, add
from pipeline.core import store
from pipeline.core.failures import Failure, failed_tasks, read_failure
from pipeline.core.files.folded_receipts import Seen, read_receipts_in
from pipeline.core.files.stamps import stamps
from pipeline.core.records import Receipt
from pipeline.core.run import Run, make_context, manifest_path
from pipeline.core.stage import FIGURES, Context, Stage

Float64Array = npt.NDArray[np.float64]

_HOURS = 6.0  # of the curve, at most
_LEAST_SECONDS = 600.0  # of the curve, at least
_NUM_BARS = 60
_RATE_SECONDS = 300.0  # over which the rate of now is taken
_SILENT_SECONDS = 120.0  # figures are written every 5 to 30 s
_MOST_HOSTS = 12
_MOST_NAMED = 8  # failed tasks of a stage


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that fetches or has fetched."""

    name: str
    rows_per_second: float  # now
    num_done: int  # addresses
    share_fetched: float
    num_calls: int  # that work now
    is_silent: bool  # it has not said for long that it works, and not that it has ended


@dataclass(frozen=True, slots=True)
class Host:
    """A web host that was asked."""

    name: str
    num_done: int  # addresses
    share_fetched: float
    failure: str  # the most frequent reason; empty if there is none


@dataclass(frozen=True, slots=True)
class Bar:
    """A step of the curve."""

    since: float  # Unix seconds
    seconds: float
    rows_per_second: float
    share_fetched: float | None  # None if nothing was asked


@dataclass(frozen=True, slots=True)
class View:
    """A run at one moment."""

    folder: str
    when: float  # Unix seconds
    finished: Sequence[str]  # stages
    stage: str | None  # that is to do now; None: all are done
    tasks_done: int = 0
    num_tasks: int | None = None  # None while it cannot be planned
    rows_done: int = 0  # of the stage's finished tasks, and of those that fetch
    num_rows: int | None = None  # of a download
    rows_per_second: float = 0.0
    seconds_left: float | None = None  # None if nothing tells
    machines: Sequence[Machine] = ()
    reasons: Sequence[tuple[str, int]] = ()  # FETCHED and reasons of failures, with their addresses
    hosts: Sequence[Host] = ()
    curve: Sequence[Bar] = ()
    failures: Sequence[tuple[str, int, Sequence[Failure]]] = ()  # stage, how many tasks, the first of them


@dataclass
class Watcher:
    """Looks at a run again and again; what has not changed is not read again."""

    run: Run
    _finished: list[str] = field(default_factory=list)
    _planned: tuple[str, Context | None, int | None] = ("", None, None)
    _receipts: Seen = field(default_factory=dict)
    _calls: dict[str, tuple[str, CallFigures]] = field(default_factory=dict)
    _counts: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=1000))

    def look(self) -> View:
        """Return what the run is doing now."""
        now = time.time()
        stage = self._current()
        failures = self._failures()
        if stage is None:
            return View(self.run.folder, now, self._finished, None, failures=failures)
        context, num_tasks = self._plan(stage)
        read = read_receipts_in(store.join(self.run.folder, stage.name, "receipts"), seen=self._receipts)
        receipts = [receipt for receipt in read.values() if receipt is not None]
        calls = self._read_calls(store.join(self.run.folder, stage.name, FIGURES))
        if calls:
            return _of_download(
                self.run.folder, now, self._finished, stage, context, num_tasks, receipts, calls, failures
            )
        self._counts.append((now, len(receipts)))
        since, before = next(item for item in self._counts if now - item[0] <= _RATE_SECONDS)
        tasks_per_second = (len(receipts) - before) / (now - since) if now > since else 0.0
        left = None
        if num_tasks is not None and tasks_per_second > 0:
            left = (num_tasks - len(receipts)) / tasks_per_second
        num_rows = sum(receipt.num_in for receipt in receipts)
        of_each = num_rows / len(receipts) if receipts else 0.0
        return View(
            self.run.folder,
            now,
            self._finished,
            stage.name,
            len(receipts),
            num_tasks,
            num_rows,
            rows_per_second=tasks_per_second * of_each,
            seconds_left=left,
            failures=failures,
        )

    def _current(self) -> Stage | None:
        for stage in self.run.stages[len(self._finished) :]:
            if not store.exists(manifest_path(self.run, stage.name)):
                return stage
            self._finished.append(stage.name)
        return None

    def _plan(self, stage: Stage) -> tuple[Context | None, int | None]:
        """Return the context and the number of tasks of a stage, planned once."""
        if self._planned[0] != stage.name:
            self._receipts, self._calls = {}, {}
            self._counts.clear()
            context, num_tasks = make_context(self.run, stage), None
            # To plan a stage that reads sources or weights would hash them, once for each who watches.
            if context is not None and stage.parents and stage.weights is None:
                num_tasks = len(stage.plan(stage.config, context))
            self._planned = (stage.name, context, num_tasks)
        return self._planned[1:]

    def _read_calls(self, folder: str) -> list[CallFigures]:
        calls = {}
        for name, stamp in stamps(folder).items():
            if not name.endswith(".json") or name.startswith("."):
                continue
            if not stamp or self._calls.get(name, ("",))[0] != stamp:
                text = store.read_text(store.join(folder, name))
                self._calls[name] = (stamp, CallFigures.from_json(json.loads(text)))
            calls[name] = self._calls[name][1]
        return list(calls.values())

    def _failures(self) -> list[tuple[str, int, Sequence[Failure]]]:
        found: list[tuple[str, int, Sequence[Failure]]] = []
        for stage in self.run.stages[: len(self._finished) + 1]:
            context = Context(self.run.folder, stage.name, self.run.seed, {})
            if names := failed_tasks(context):
                first = [read_failure(context, name) for name in names[:_MOST_NAMED]]
                found.append((stage.name, len(names), [item for item in first if item is not None]))
        return found


def _of_download(
    folder: str,
    now: float,
    finished: Sequence[str],
    stage: Stage,
    context: Context | None,
    num_tasks: int | None,
    receipts: Sequence[Receipt],
    calls: Sequence[CallFigures],
    failures: Sequence[tuple[str, int, Sequence[Failure]]],
) -> View:
    working = [call for call in calls if not call.is_over and now - call.now <= _SILENT_SECONDS]
    rows_done = sum(receipt.num_in for receipt in receipts)
    rows_done += sum(max(0, call.num_done - call.num_packed) for call in working)
    num_rows = (
        context.parents["dedup"].num_kept if context is not None and "dedup" in context.parents else None
    )
    machines = [_machine(name, own, now) for name, own in sorted(_by_machine(calls).items())]
    rate = sum(machine.rows_per_second for machine in machines)
    left = (num_rows - rows_done) / rate if num_rows is not None and rate > 0 else None
    tallies: Tallies = {}
    for call in calls:
        add(tallies, {host: Counter(reasons) for host, reasons in call.hosts.items()})
    reasons = sum(tallies.values(), Counter[str]())
    hosts = sorted(tallies, key=lambda host: (-tallies[host].total(), host))[:_MOST_HOSTS]
    return View(
        folder,
        now,
        finished,
        stage.name,
        len(receipts),
        num_tasks,
        rows_done,
        num_rows,
        rate,
        left,
        machines,
        reasons.most_common(),
        [_host(name, tallies[name]) for name in hosts],
        _curve(calls, now),
        failures,
    )


def _by_machine(calls: Sequence[CallFigures]) -> Mapping[str, list[CallFigures]]:
    found: dict[str, list[CallFigures]] = {}
    for call in calls:
        found.setdefault(call.machine, []).append(call)
    return found


def _machine(name: str, calls: Sequence[CallFigures], now: float) -> Machine:
    start = max(now - _RATE_SECONDS, min(call.curve[0][0] for call in calls))
    done_2 = _cumulative(calls, np.array([start, now]))[0]
    done, fetched = sum(call.num_done for call in calls), sum(call.curve[-1][2] for call in calls)
    running = [call for call in calls if not call.is_over]
    silent = [call for call in running if now - call.now > _SILENT_SECONDS]
    return Machine(
        name,
        float(done_2[1] - done_2[0]) / max(now - start, 1.0),
        done,
        fetched / done if done else 0.0,
        len(running) - len(silent),
        bool(silent) and len(silent) == len(running),
    )


def _host(name: str, reasons: Counter[str]) -> Host:
    total = reasons.total()
    failures = Counter({reason: count for reason, count in reasons.items() if reason != FETCHED})
    worst = failures.most_common(1)
    return Host(name, total, reasons[FETCHED] / total if total else 0.0, worst[0][0] if worst else "")


def _curve(calls: Sequence[CallFigures], now: float) -> list[Bar]:
    first = min(call.curve[0][0] for call in calls)
    start = max(now - _HOURS * 3600, min(first, now - _LEAST_SECONDS))
    edges = np.linspace(start, now, _NUM_BARS + 1)
    done, fetched = (np.diff(values) for values in _cumulative(calls, edges))
    seconds = (now - start) / _NUM_BARS
    return [
        Bar(float(since), seconds, float(num) / seconds, float(good / num) if num > 0 else None)
        for since, num, good in zip(edges, done, fetched, strict=False)
    ]


def _cumulative(calls: Sequence[CallFigures], times: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return how many addresses were done, and how many fetched, until some times, float64 [times] each."""
    done, fetched = np.zeros(len(times)), np.zeros(len(times))
    for call in calls:
        when, of_done, of_fetched = zip(*call.curve, strict=True)
        done += np.interp(times, when, of_done)
        fetched += np.interp(times, when, of_fetched)
    return done, fetched
