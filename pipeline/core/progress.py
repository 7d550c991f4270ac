"""Progress for people: a bar on a terminal, plain lines elsewhere, nothing if the command is quiet.

Each stage has one bar, and only one bar is drawn at a time: a new one closes the previous one, and
`close_progress` completes the last one when a command ends, also after Ctrl-C.
"""

import os
import sys
import time
from typing import TYPE_CHECKING, Protocol

from pipeline.core.stage import Progress
from pipeline.core.terminal import Verbosity, guard, one_line, unguarded, verbosity

if TYPE_CHECKING:
    from pipeline.core.bar import Bar

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_DRAWINGS = 0.1
_SECONDS_TO_KNOW = 0.5  # before a rate is shown


class _Closing(Progress, Protocol):
    def close(self) -> None: ...


_current: _Closing | None = None


def make_progress(label: str, unit: str = "task") -> Progress:
    """Return a Progress that draws on standard error; one per stage.

    `unit` is singular.
    """
    global _current
    close_progress()
    if verbosity() <= Verbosity.QUIET:
        return _silent
    _current = _Bar(label, unit) if _can_draw() else _Lines(label, unit)
    return _current


def close_progress() -> None:
    """End the current bar's line, if there is a bar."""
    global _current
    current, _current = _current, None
    if current is not None:
        current.close()


def _silent(done: int, total: int, text: str = "") -> None:
    """Show nothing."""


def _can_draw() -> bool:
    """Return whether standard error is a terminal that reports its size and can move its cursor.

    On a terminal without a size a bar would be invisible.
    """
    return (
        sys.stderr.isatty()
        and os.environ.get("TERM") != "dumb"
        and os.get_terminal_size(sys.stderr.fileno()).lines > 0
    )


class _Rate:
    """Units per second and remaining time since the first call, ignoring units that were already done."""

    def __init__(self, unit: str) -> None:
        self._units = f"{unit}s"
        self._first: tuple[int, float] | None = None
        self._total: int | None = None

    def say(self, done: int, total: int, text: str) -> tuple[str, str]:
        """Return text and remaining time, such as ("3.2 rows/s · loss 4.1", "0:09 left").

        A text of one word names the units; one with a rate, such as training's samples/s, stays as it is.
        """
        units, words = (text, "") if text.isalpha() else (self._units, text)
        now = time.monotonic()
        # The total changed: a task with other units, such as steps, has begun.
        if self._first is None or done < self._first[0] or total != self._total:
            self._first, self._total = (done, now), total
        first, since = self._first
        if done == first or now - since < _SECONDS_TO_KNOW:
            return text, ""
        a_second = (done - first) / (now - since)
        rate = f"{a_second:,.0f} {units}/s" if a_second >= 10 else f"{a_second:.1f} {units}/s"
        if a_second < 1:
            rate = f"{1 / a_second:,.1f} s each"
        left = f"{duration((total - done) / a_second)} left" if done < total else ""
        return " · ".join(part for part in ("" if "/s" in words else rate, words) if part), left


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Lines:
    """Occasional plain lines, and one at the end."""

    def __init__(self, label: str, unit: str) -> None:
        self._label = label
        self._last = time.monotonic()
        self._rate = _Rate(unit)

    def __call__(self, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        words, left = self._rate.say(done, total, text)
        if done < total and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        said = "  ".join(part for part in (f"{self._label}: {done:,} of {total:,}", words, left) if part)
        print(one_line(said), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing, because every line is complete."""


class _Bar:
    """A one-line bar, below other output."""

    def __init__(self, label: str, unit: str) -> None:
        self._label = one_line(label)
        self._rate = _Rate(unit)
        self._bar: Bar | None = None
        self._last_drawn = 0.0

    def __call__(self, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        is_done = done >= total
        if not is_done and now - self._last_drawn < _SECONDS_BETWEEN_DRAWINGS:
            return
        self._last_drawn = now
        words, left = self._rate.say(done, total, one_line(text))
        bar = self._bar or self._make()
        bar.show(done, total, f"{done:,}/{total:,}", words, left)
        if self._bar is None:
            self._start(bar)
        bar.refresh()
        if is_done:
            self.close()

    def close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def _make(self) -> "Bar":
        # Imported here: rich takes as long as the rest of a short command.
        from pipeline.core.bar import Bar

        # The bar moves the cursor, which a guarded stream would escape.
        return Bar(unguarded(sys.stderr), self._label)

    def _start(self, bar: "Bar") -> None:
        self._bar = bar
        before = sys.stdout
        bar.start()
        # Until the bar is closed, rich replaces the streams, so that other output appears above the bar.
        sys.stdout = before if sys.stdout is before else guard(sys.stdout)
        sys.stderr = guard(sys.stderr)
