"""What a call of the download has done so far, in a file of the stage's folder, for `cnclip status --watch`.

Every machine of a run writes such files, one a call, so they say what comes from where and how fast. The
runner removes them when the stage is done: receipts have what lasts.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from data_prep.download.tally import FETCHED, Tallies, read_tallies, with_most
from pipeline.core import store
from pipeline.core.facts import Facts
from pipeline.core.records import ConfigError
from pipeline.core.stage import FIGURES, Context, Task

_SECONDS, _SECONDS_REMOTE = 5.0, 30.0  # from one writing to the next
_POINT_SECONDS = 30.0  # from one point of the curve to the next
_MOST_POINTS = 1000  # then every second one goes
_MOST_HOSTS = 100

Point = tuple[float, int, int]  # time (Unix seconds); addresses until then; of these fetched


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFigures(Facts):
    """A call of the downloader on one machine."""

    machine: str
    now: float  # when this was written, Unix seconds
    num_rows: int  # that the call asks the web for
    num_packed: int  # of these in finished partitions
    is_over: bool
    hosts: Mapping[str, Mapping[str, int]]  # host → reason, or FETCHED → addresses
    curve: Sequence[Point]  # the last point is of `now`

    @property
    def num_done(self) -> int:
        """Return the number of addresses that have answered or failed."""
        return self.curve[-1][1]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        curve = [(float(when), int(done), int(fetched)) for when, done, fetched in fields["curve"]]
        known = {
            name: fields[name] for name in ("machine", "now", "num_rows", "num_packed", "is_over", "hosts")
        }
        return cls(curve=curve, **known)


class FiguresFile:
    """The file of one call."""

    def __init__(self, context: Context, first: Task, num_rows: int, tallies: Path) -> None:
        """Begin the figures of a call that asks for so many rows."""
        self._num_rows, self._tallies = num_rows, tallies
        began = time.time()
        self._machine = socket.gethostname()
        self._path = context.path(FIGURES, f"{first.name}.{self._machine}.{os.getpid()}.{began:.0f}.json")
        self._seconds = _SECONDS if store.is_local(self._path) else _SECONDS_REMOTE
        self._curve: list[Point] = [(began, 0, 0)]
        self._last = time.monotonic()
        self._num_packed = 0

    def look(self, num_packed: int) -> None:
        """Write if it is time. `num_packed` is the number of rows in finished partitions."""
        self._num_packed = num_packed
        if time.monotonic() - self._last > self._seconds:
            self.write()

    def write(self, *, is_over: bool = False) -> None:
        """Write what the workers have counted."""
        self._last = time.monotonic()
        hosts = read_tallies(self._tallies)
        point = (time.time(), _num(hosts), sum(reasons[FETCHED] for reasons in hosts.values()))
        figures = CallFigures(
            machine=self._machine,
            now=point[0],
            num_rows=self._num_rows,
            num_packed=self._num_packed,
            is_over=is_over,
            hosts=with_most(hosts, _MOST_HOSTS),
            curve=[*self._curve, point],
        )
        if point[0] - self._curve[-1][0] > _POINT_SECONDS:
            self._curve.append(point)
        if len(self._curve) > _MOST_POINTS:
            self._curve = self._curve[::2]
        # Figures are for people: a store that fails now ends no download.
        with contextlib.suppress(OSError, ConfigError):
            store.write_text(self._path, json.dumps(figures.to_json(), ensure_ascii=False))


@contextlib.contextmanager
def figures_of_call(context: Context, first: Task, num_rows: int, tallies: Path) -> Iterator[FiguresFile]:
    """Keep the figures of a call while the block runs; it tells how many rows are packed (`look`)."""
    tallies.mkdir()
    file = FiguresFile(context, first, num_rows, tallies)
    try:
        yield file
    finally:
        file.write(is_over=True)


def _num(hosts: Tallies) -> int:
    return sum(reasons.total() for reasons in hosts.values())
