"""The threads that fetch, in place of img2dataset's: a row whose host has to wait holds no thread.

img2dataset gives each thread the next row of its shard. If that row's host asked for a pause, or has all the
requests that it may have, the thread would sleep, and soon all of them at the same host.
"""

import collections
import heapq
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from data_prep.download.web.hosts import Hosts


@dataclass(frozen=True, slots=True)
class Later:
    """What a function returns for a row that is to be given to it again, as `row`."""

    row: Any


@dataclass(slots=True)
class _Line:
    """The rows of a host."""

    rows: collections.deque[Any] = field(default_factory=collections.deque)
    num_running: int = 0
    is_due: bool = False  # in the heap


class HostPool:
    """Calls a function on rows in threads, in the order in which their hosts may be asked.

    Has of multiprocessing's ThreadPool what img2dataset uses. A host has at most `most_running` rows running,
    the one named `""` as many as there are threads. About twice as many rows as threads run or wait to be
    taken at most.
    """

    def __init__(
        self, num_threads: int, hosts: Hosts, host_of: Callable[[Any], str], most_running: int
    ) -> None:
        self._num_threads, self._hosts, self._host_of = num_threads, hosts, host_of
        self._most_running = most_running
        self._lines: dict[str, _Line] = {}
        self._due: list[tuple[float, int, str]] = []  # heap: when (time.monotonic()), in which order, host
        self._num_pushed = self._num_left = 0
        self._is_timed = False  # a thread waits at the clock, for the first of the heap; all others for it
        self._is_stopped = False
        self._lock = threading.Lock()
        self._work_is_there = threading.Condition(self._lock)
        self._clock = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        # Two at least: whoever takes the last but one still sees that a thread waits for room.
        self._most_results = max(2, num_threads)
        self._is_full = False  # a thread waits for room
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def imap_unordered(self, function: Callable[[Any], Any], rows: Iterable[Any]) -> Iterator[Any]:
        """Yield what `function` returns for each row, as it comes; what it raises is raised here."""
        for row in rows:
            self._lines.setdefault(self._host_of(row), _Line()).rows.append(row)
            self._num_left += 1
        for host, line in self._lines.items():
            self._push(host, line, time.monotonic())
        num_rows = self._num_left
        for _ in range(min(self._num_threads, num_rows)):
            thread = threading.Thread(target=self._work, args=(function,), daemon=True)
            thread.start()
            self._threads.append(thread)
        for _ in range(num_rows):
            found = self._results.get()
            if isinstance(found, BaseException):
                raise found
            yield found
            if self._is_full and self._results.qsize() < self._most_results:
                with self._lock:
                    self._is_full = False
                    self._room.notify_all()

    def terminate(self) -> None:
        """Let every thread end after the row that it has."""
        with self._lock:
            self._is_stopped = True
            self._wake_all()

    def join(self) -> None:
        """Wait until all threads have ended."""
        for thread in self._threads:
            thread.join()

    def _work(self, function: Callable[[Any], Any]) -> None:
        taken = self._take()
        while taken is not None:
            host, row = taken
            found: Any
            try:
                found = function(row)
            except BaseException as error:
                found = error
            if not isinstance(found, Later):
                self._results.put(found)
            taken = self._take(host, found)

    def _take(self, last: str | None = None, found: Any = None) -> tuple[str, Any] | None:
        """End a row of host `last`, and return the next row and its host when its turn has come.

        Returns None if no row is left.
        """
        with self._lock:
            if last is not None:
                self._end(last, found)
            while not self._is_stopped and self._num_left:
                if self._results.qsize() >= self._most_results:
                    self._is_full = True
                    self._room.wait()
                    continue
                now = time.monotonic()
                if self._due and self._due[0][0] <= now:
                    host = heapq.heappop(self._due)[2]
                    line = self._lines[host]
                    line.is_due = False
                    if (at := self._hosts.ask(host, now)) > now:
                        self._push(host, line, at)
                        continue
                    line.num_running += 1
                    row = line.rows.popleft()
                    self._push(host, line, now)
                    if self._due and not self._is_timed:
                        self._work_is_there.notify()
                    return host, row
                if self._is_timed:
                    self._work_is_there.wait()
                    continue
                self._is_timed = True
                self._clock.wait(self._due[0][0] - now if self._due else None)
                self._is_timed = False
            return None

    def _end(self, host: str, found: Any) -> None:
        line = self._lines[host]
        line.num_running -= 1
        if isinstance(found, Later):
            line.rows.append(found.row)
        else:
            self._num_left -= 1
        if not self._num_left:
            self._wake_all()
        elif self._push(host, line, time.monotonic()):
            (self._clock if self._is_timed else self._work_is_there).notify()

    def _wake_all(self) -> None:
        self._work_is_there.notify_all()
        self._clock.notify_all()
        self._room.notify_all()

    def _push(self, host: str, line: _Line, at: float) -> bool:
        """Put a host into the heap, if it has a row that may run; return whether it was put there."""
        if line.is_due or not line.rows or (host and line.num_running >= self._most_running):
            return False
        line.is_due = True
        self._num_pushed += 1
        heapq.heappush(self._due, (at, self._num_pushed, host))
        return True
