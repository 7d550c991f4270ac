"""Tasks that fail: what is noted of each, which errors are the machine's, and what a run says in the end."""

import contextlib
import dataclasses
import json
import os
import socket
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.core import store
from pipeline.core.files.foreign import OF_THE_MACHINE
from pipeline.core.records import ConfigError, DropReason, InputError, Stopped
from pipeline.core.stage import Context, Task
from pipeline.core.terminal import one_line

TRIES = 3  # of a task, the first included: what a machine or a moment did does not come back that often
_LEAST_FAILED = 10  # tasks that fail before a stage may stop for them
_MOST_FAILED = 0.1  # share of failed tasks above which something is wrong that concerns them all
PARTITION_FAILED = DropReason("partition_failed")  # a row of a task that a run continues without
_MOST_NAMED = 5
_Error = TypeVar("_Error", bound=InputError)


@dataclass(frozen=True, slots=True)
class Failure:
    """What is known of a task that failed; the file `failed/<task>.json` of its stage's folder holds it."""

    task: str
    machine: str
    error: str  # one line
    tries: int = 1
    trace: str = ""  # of an error that is none of ours
    is_of_machine: bool = False  # the next task there would fail, too: a full disk, no network

    @property
    def is_unexpected(self) -> bool:
        """Whether neither this project nor the system raises such errors: altered inputs may be behind it."""
        return bool(self.trace)

    @classmethod
    def of(cls, task: Task, error: BaseException) -> "Failure":
        """Return the failure that an error is, on the machine that calls it.

        Raises:
            BaseException: the error itself, if it ends the run: a signal, or settings that no task can run
                with.
        """
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | Stopped | ConfigError):
            raise error
        is_known = isinstance(error, InputError | OSError | MemoryError)
        return cls(
            task.name,
            socket.gethostname(),
            one_line(_text(error)),
            trace="" if is_known else "".join(traceback.format_exception(error)),
            is_of_machine=is_of_machine(error),
        )

    def again(self, later: "Failure") -> "Failure":
        """Return the failure after one more try, which failed as `later` says."""
        return dataclasses.replace(later, tries=self.tries + later.tries)


def _text(error: BaseException) -> str:
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory: take smaller settings, such as [run] processes"
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


def outage(error: _Error) -> _Error:
    """Note that an error is of the machine or its network, and would also meet the next task."""
    error.is_outage = True
    return error


def is_of_machine(error: BaseException) -> bool:
    """Return whether the next task on this machine would also meet the error."""
    if isinstance(error, OSError):
        return error.errno in OF_THE_MACHINE
    return isinstance(error, InputError) and error.is_outage


def too_many(num_failed: int, num_done: int) -> bool:
    """Return whether so many tasks fail that trying the others is pointless."""
    return num_failed > _LEAST_FAILED and num_failed > _MOST_FAILED * (num_failed + num_done)


def failed_path(context: Context, task: str) -> str:
    """Return the path of the note on a task that failed."""
    return context.path("failed", f"{task}.json")


def write_failure(context: Context, failure: Failure) -> None:
    """Note a task that failed next to the stage's receipts."""
    text = json.dumps(dataclasses.asdict(failure), ensure_ascii=False, indent=1)
    store.write_text(failed_path(context, failure.task), f"{text}\n")


def failed_tasks(context: Context) -> list[str]:
    """Return the names of the tasks of a stage that failed when it was last run, in order."""
    names = [name for name in store.list_files(context.path("failed")) if name.endswith(".json")]
    return sorted(name.removesuffix(".json") for name in names)


def read_failure(context: Context, task: str) -> Failure | None:
    """Return the note on a task that failed; None if it is gone, or of another release."""
    try:
        return Failure(**json.loads(store.read_bytes(failed_path(context, task))))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def forget_failures(context: Context) -> None:
    """Remove the notes of an earlier start, whose tasks are tried again."""
    with contextlib.suppress(FileNotFoundError):
        store.remove(context.path("failed"))


def summary(
    context: Context, failures: Sequence[Failure], num_tasks: int, *, can_go_on: bool, instead: str = ""
) -> str:
    """Return the line that a stage ends with: the first error, which tasks failed, and what to do.

    `instead` says what to do if nothing repairs a task of a stage that cannot continue without it.
    """
    first = min(failures, key=lambda failure: failure.task)
    others = sorted(failure.task for failure in failures if failure is not first)
    times = f"{first.tries} times, last on" if first.tries > 1 else "on"
    named = f"task {first.task} of {context.stage} failed {times} {first.machine}"
    if others:
        listed = ", ".join(others[:_MOST_NAMED])
        more = f" and {len(others) - _MOST_NAMED:,} more" if len(others) > _MOST_NAMED else ""
        named += f", and so did {len(others):,} of the other {num_tasks - 1:,} ({listed}{more})"
    remedy = "repair it and rerun to try again"
    if can_go_on:
        remedy += ", or continue without these rows with --without-failed"
    elif instead:
        remedy += f"; {instead}"
    return f"{first.error}; {named}; see {context.path('failed')}; {remedy}"
