"""Estimates what a corpus of web images costs before there is one: hours, bytes, and the price of failures.

docs/scale.md derives each term, and says what was measured and what is assumed. No import of a stage.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.config import apply_overrides
from pipeline.core.records import ConfigError
from pipeline.core.text_table import align
from pipeline.planning.speed import IMAGE_BYTES

# Rates of one core, per CPU second, as this repository's benchmarks measured them (docs/scale.md names each
# record).
TABLE_ROWS = 3_371_000.0  # through `corpus`
TEXT_ROWS = 305_200.0  # through `filter_text`
DEDUP_ROWS = 646_200.0  # through `dedup`
DOWNLOADED = 115.8  # fetched over http from loopback, reduced, hashed and packed
JUDGED = 11_760.0  # images through `filter_image`, which reads tables only
TLS_SECONDS = 2.169e-3  # what https adds to a request to a host that is asked once
SURVEY_SECONDS = 17.2  # by the clock, of 30,000 finished tasks in an object store
HASHED_BYTES = 1.554e9  # read and hashed by `verify`

_PARTITION_ROWS = 10_000
_ROWS_OF_A_SLICE, _ROWS_OF_A_TASK = 500_000, 1_000_000  # of `filter_text`, of `dedup`
_ATTEMPTS = 3  # of a task before it is set aside
_HOUR = 3600.0
_MAY_BE_NONE = ("https", "busiest_host")  # shares
_IN_THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+")  # as this module's own tables write numbers
HEADER = ("stage", "from h", "to h", "bound by", "core-hours", "cores busy", "TB read", "TB written")
FAILURE_HEADER = ("what fails", "what is done again", "machine-hours", "later by")
_TB = 1e12
_SLOW_NAMES = 200.0  # answers a second of a resolver that many share
_OUTAGE = 600.0  # seconds without the object store


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What nothing here measures; `cnclip plan corpus --set key=value` replaces each."""

    rows: float = 5.85e9
    row_bytes: float = 150.0
    images: float = 200e6
    alive: float = 0.7
    https: float = 0.8
    wire_bytes: float = 191_244.0
    stored_bytes: float = IMAGE_BYTES
    machines: float = 10
    cores: float = 16
    gigabits: float = 10.0
    connections: float = 2_048
    request_seconds: float = 2.0
    names_per_second: float = 1_000.0
    busiest_host: float = 0.01
    host_requests: float = 50.0
    store_seconds: float = 0.03

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < 1e15 or (value == 0 and field.name not in _MAY_BE_NONE):
                raise ConfigError(
                    f"--set {field.name}={value}: give a number above 0, such as 200e6 or 200,000,000"
                )
            if field.name in ("alive", *_MAY_BE_NONE) and value > 1:
                raise ConfigError(f"--set {field.name}={value}: a share is at most 1")
            if field.name in ("rows", "images", "machines", "cores") and value != int(value):
                raise ConfigError(f"--set {field.name}={value}: give a whole number")
        if self.rows < self.asked:
            raise ConfigError(
                f"--set rows={self.rows:,.0f}: fewer than the {self.asked:,.0f} addresses that"
                f" {self.images:,.0f} images at alive={self.alive:g} need; raise rows or lower images"
            )

    @property
    def asked(self) -> float:
        """Addresses that the download asks for."""
        return self.images / self.alive

    @property
    def partitions(self) -> float:
        return self.asked / _PARTITION_ROWS

    @property
    def partition_seconds(self) -> float:
        """How long one process downloads a partition."""
        return _PARTITION_ROWS * self.request_seconds / (self.connections / self.cores)

    @property
    def bytes_a_second(self) -> float:
        """Of all machines together."""
        return self.gigabits * 1e9 / 8 * self.machines


@dataclass(frozen=True, slots=True)
class Step:
    """One stage on the whole cluster: the longest of its bounds, in seconds, is what it takes."""

    name: str
    core_seconds: float
    bytes_in: float
    bytes_out: float
    bounds: dict[str, float]

    @property
    def seconds(self) -> float:
        return max(self.bounds.values())

    @property
    def bound_by(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that goes wrong: what is done again, the work of it, and how much later the end is."""

    name: str
    again: str
    machine_hours: float
    delay: float | None  # seconds; None: there is no end


def assumed(overrides: Sequence[str]) -> Assumed:
    """Return the defaults with `key=value` items in their place.

    Raises:
        ConfigError: for another key, and for a value that is no number in range.
    """
    table: dict[str, Any] = apply_overrides({}, overrides)
    for key, value in table.items():
        if isinstance(value, str) and _IN_THOUSANDS.fullmatch(value):
            table[key] = int(value.replace(",", ""))
    names = [field.name for field in dataclasses.fields(Assumed)]
    for key in table:
        if key not in names:
            raise ConfigError(f"--set {key}: cnclip plan corpus has {', '.join(names)}")
    return Assumed(**table)


def steps(on: Assumed) -> list[Step]:
    """Return the stages of a corpus in their order, up to the finished shards and a check of their bytes."""
    metadata = on.rows * on.row_bytes
    text = on.asked * on.row_bytes
    wire, stored = on.images * on.wire_bytes, on.images * on.stored_bytes
    return [
        _step(on, "corpus", on.rows / TABLE_ROWS, metadata, 0.0),
        _step(on, "filter_text", on.rows / TEXT_ROWS, metadata, text),
        _step(
            on,
            "dedup",
            on.asked / DEDUP_ROWS,
            text,
            text,
            {"store": openings(on) * on.store_seconds / (on.machines * on.cores)},
        ),
        _step(
            on,
            "download",
            on.images / DOWNLOADED + on.asked * on.https * TLS_SECONDS,
            wire,
            stored,
            {
                "connections": on.asked * on.request_seconds / (on.connections * on.machines),
                "names": on.asked / (on.names_per_second * on.machines),
                "one host": on.asked * on.busiest_host / (on.host_requests * on.machines),
            },
        ),
        _step(on, "filter_image", on.images / JUDGED, text, text),
        _step(
            on,
            "shards",
            0.0,
            text,
            text,
            {"store": 4 * on.partitions * on.store_seconds / (on.machines * on.cores)},
        ),
        _step(on, "verify", stored / HASHED_BYTES, stored, 0.0),
    ]


def openings(on: Assumed) -> float:
    """Return how often a task of `dedup` opens a file of `filter_text`."""
    return on.asked / _ROWS_OF_A_TASK * on.rows / _ROWS_OF_A_SLICE


def failures(on: Assumed) -> list[Failure]:
    """Return what goes wrong in a download of days, and what each costs."""
    whole = {step.name: step.seconds for step in steps(on)}
    half = on.partition_seconds / 2  # a partition that is lost is half done on average
    download, machines = whole["download"], on.machines
    rest = download / 2 / (machines - 1) if machines > 1 else None
    again = SURVEY_SECONDS + half
    slow = on.asked / (_SLOW_NAMES * machines)
    text = whole["corpus"] + whole["filter_text"] + whole["dedup"]
    copied = on.images * on.stored_bytes / on.bytes_a_second
    one = on.partition_seconds / on.cores / _HOUR
    return [
        Failure(
            "a partition cannot be downloaded", f"the partition, {_ATTEMPTS} times", _ATTEMPTS * one, 0.0
        ),
        Failure("a tar is damaged afterwards", "the partition", one, on.partition_seconds),
        Failure("a machine restarts", "its running partitions", half / _HOUR, half / machines),
        Failure(
            "a machine is lost, or has no disk or network left, halfway through the download",
            "its running partitions; the others do the rest",
            half / _HOUR,
            rest,
        ),
        Failure(
            "the driver ends and is started again",
            "the survey of the stage, all running partitions",
            again * machines / _HOUR,
            again,
        ),
        Failure(
            "the object store is away for ten minutes",
            "the same, after a rerun",
            (_OUTAGE + again) * machines / _HOUR,
            _OUTAGE + again,
        ),
        Failure(
            f"the resolvers answer {_SLOW_NAMES:g} names a second",
            "nothing",
            max(0.0, slow - download) * machines / _HOUR,
            max(0.0, slow - download),
        ),
        Failure(
            "a rule on text changes after the download",
            "the text stages; `[download] reuse` copies the images",
            (text + copied) * machines / _HOUR,
            text + copied,
        ),
    ]


def plan_table(on: Assumed) -> str:
    """Return the timetable and the failures as aligned text, with what both assume."""
    rows = [HEADER, *timetable(on)]
    total = sum(step.seconds for step in steps(on)) / _HOUR
    values = dataclasses.asdict(on)
    said = ", ".join(f"{name}={value:g}" for name, value in values.items())
    costs = [FAILURE_HEADER, *failure_rows(on)]
    return (
        f"{on.images:,.0f} images from {on.rows:,.0f} rows of metadata on"
        f" {_counted(on.machines, 'machine')} of {_counted(on.cores, 'core')}:"
        f" {total:,.1f} hours, {total * on.machines:,.0f} machine-hours\n\n"
        + align(rows, (False, True, True, False, *[True] * 4))
        + "\n\n"
        + align(costs, (False, False, True, True))
        + f"\n\nassumed, and replaced by --set key=value: {said}\nrates of a core: docs/scale.md"
    )


def timetable(on: Assumed) -> list[tuple[str, ...]]:
    """Return a row of text for each stage, as the plan and docs/scale.md have it."""
    rows: list[tuple[str, ...]] = []
    start = 0.0
    for step in steps(on):
        end = start + step.seconds
        busy = step.core_seconds / (step.seconds * on.machines * on.cores)
        rows.append(
            (
                *(step.name, f"{start / _HOUR:.2f}", f"{end / _HOUR:.2f}", step.bound_by),
                *(f"{step.core_seconds / _HOUR:,.1f}", f"{busy:.0%}"),
                *(f"{step.bytes_in / _TB:,.2f}", f"{step.bytes_out / _TB:,.2f}"),
            )
        )
        start = end
    return rows


def failure_rows(on: Assumed) -> list[tuple[str, ...]]:
    """Return a row of text for each failure, as the plan and docs/scale.md have it."""
    return [
        (item.name, item.again, f"{item.machine_hours:,.2f}", _duration(item.delay)) for item in failures(on)
    ]


def _counted(number: float, what: str) -> str:
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "no end"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / _HOUR:.1f} h"


def _step(
    on: Assumed,
    name: str,
    core_seconds: float,
    bytes_in: float,
    bytes_out: float,
    more: dict[str, float] | None = None,
) -> Step:
    """Return a step bound by its cores, by the network, whose directions are independent, or by more."""
    bounds = {
        "cores": core_seconds / (on.machines * on.cores),
        "network": max(bytes_in, bytes_out) / on.bytes_a_second,
    }
    return Step(name, core_seconds, bytes_in, bytes_out, bounds | (more or {}))
