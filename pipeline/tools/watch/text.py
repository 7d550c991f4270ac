"""A view of a run as lines of a terminal."""

import time
from collections.abc import Sequence

from pipeline.core.progress import duration
from pipeline.core.text_table import align
from pipeline.tools.watch.watcher import Bar, View

_BLOCKS = " ▁▂▃▄▅▆▇█"


def lines_of(view: View) -> list[str]:
    """Return what a view shows, line by line."""
    clock = time.strftime("%H:%M:%S", time.localtime(view.when))
    lines = [f"{view.folder}  {clock}  {headline(view)}"]
    if view.stage is not None:
        lines.append(progress(view))
    if view.curve:
        lines += ["", *_curve(view.curve)]
    for rows in (machine_rows(view), reason_rows(view), host_rows(view)):
        if len(rows) > 1:
            lines += ["", *align(rows, [column > 0 for column in range(len(rows[0]))]).splitlines()]
    for stage, count, failures in view.failures:
        lines += ["", f"{stage}: {tasks(count)} failed and set aside"]
        lines += [f"  {item.task} on {item.machine}: {item.error}" for item in failures]
    return lines


def headline(view: View) -> str:
    """Return which stage is to do, and how far the run is."""
    if view.stage is None:
        return f"all {len(view.finished)} stages are done"
    return f"{view.stage} (after {len(view.finished)} finished stages)"


def progress(view: View) -> str:
    """Return how far the stage is: tasks, rows, rate and time left."""
    parts = [f"{view.tasks_done:,} of {'?' if view.num_tasks is None else f'{view.num_tasks:,}'} tasks"]
    total = "" if view.num_rows is None else f" of {view.num_rows:,} ({share(view.rows_done, view.num_rows)})"
    parts.append(f"{view.rows_done:,}{total} rows")
    parts.append(f"{rate(view.rows_per_second)} rows/s")
    if view.seconds_left is not None:
        parts.append(f"{duration(max(0.0, view.seconds_left))} left")
    return " · ".join(parts)


def machine_rows(view: View) -> list[tuple[str, ...]]:
    """Return the table of machines, its head first."""
    rows: list[tuple[str, ...]] = [("machine", "rows/s", "addresses", "fetched", "calls")]
    for item in view.machines:
        calls = "no response" if item.is_silent else f"{item.num_calls}"
        fetched = f"{item.share_fetched:.1%}"
        rows.append((item.name, rate(item.rows_per_second), f"{item.num_done:,}", fetched, calls))
    return rows


def reason_rows(view: View) -> list[tuple[str, ...]]:
    """Return the table of answers and reasons, its head first."""
    total = sum(count for _, count in view.reasons)
    rows: list[tuple[str, ...]] = [("answer", "addresses", "share")]
    return rows + [(reason, f"{count:,}", share(count, total)) for reason, count in view.reasons]


def host_rows(view: View) -> list[tuple[str, ...]]:
    """Return the table of the hosts that were asked most, its head first."""
    rows: list[tuple[str, ...]] = [("host", "addresses", "fetched", "most frequent failure")]
    return rows + [
        (item.name, f"{item.num_done:,}", f"{item.share_fetched:.1%}", item.failure) for item in view.hosts
    ]


def tasks(count: int) -> str:
    """Return a number of tasks in words."""
    return "1 task" if count == 1 else f"{count:,} tasks"


def rate(a_second: float) -> str:
    """Return a rate with the digits that it deserves."""
    return f"{a_second:,.0f}" if a_second >= 10 else f"{a_second:.1f}"


def share(part: int, whole: int) -> str:
    """Return a share in percent."""
    return f"{part / whole:.1%}" if whole else ""


def _curve(bars: Sequence[Bar]) -> list[str]:
    most = max(bar.rows_per_second for bar in bars) or 1.0
    hours = sum(bar.seconds for bar in bars) / 3600
    rates = "".join(_BLOCKS[round(8 * bar.rows_per_second / most)] for bar in bars)
    shares = "".join(
        " " if bar.share_fetched is None else _BLOCKS[round(8 * bar.share_fetched)] for bar in bars
    )
    return [
        f"last {hours:.1f} h" if hours >= 1 else f"last {60 * hours:.0f} min",
        f"  rows/s  {rates}  at most {rate(most)}",
        f"  fetched {shares}  of 100%",
    ]
