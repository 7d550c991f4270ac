"""Run tasks on this machine: one after the other, together, or in several processes."""

import collections
import concurrent.futures
import functools
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from pipeline.core.failures import TRIES, Failure, is_of_machine
from pipeline.core.files import durability
from pipeline.core.processes import begin_worker, sharing_cores, spawning
from pipeline.core.records import InputError, Receipt
from pipeline.core.run import receipts_that_count
from pipeline.core.stage import Context, Outcome, Progress, Stage, Task, make_receipt
from pipeline.core.stored_manifests import without_manifests


class OfTask(Protocol):
    """What a task came to, which names the task."""

    @property
    def task(self) -> str: ...


Found = TypeVar("Found", bound=OfTask)

_HANDED_OVER = 4  # tasks for each process that wait in its pool
_KILLED = (
    "a worker process was killed, most often because memory ran out; rerun with a smaller [run] processes"
)


def run_tasks(
    stage: Stage,
    context: Context,
    pending: Sequence[Task],
    processes: int,
    progress: Progress,
    num_done: int,
    num_tasks: int,
) -> Iterator[Receipt | Failure]:
    """Run the pending tasks of a stage with `num_tasks` tasks, of which `num_done` are done.

    Progress is the task's own if it is the only one, else the number of tasks done. A task that fails is
    tried again, in another process where there are several, and becomes a Failure in the end; the others
    continue.

    Raises:
        ConfigError, Stopped: as tasks raise them.
        OSError, InputError: what concerns the machine (`pipeline.core.failures.is_of_machine`), and whatever
            the only task of a stage raises.
    """
    if stage.run_together is not None:
        for receipt in _run_together(stage, context, pending, progress):
            yield _unless_of_machine(receipt)
        return
    if num_tasks == 1 or not stage.parallel:
        yield from _run_in_turn(stage, context, pending, progress, num_done, num_tasks)
        return
    if len(pending) > 1 and processes > 1:
        context = without_manifests(context)
    do = functools.partial(try_task, stage, context)
    yield from counted(each(do, pending, processes), progress, num_done, num_tasks)


def each(
    do: Callable[[Task], Found | Failure], tasks: Sequence[Task], processes: int
) -> Iterator[Found | Failure]:
    """Yield what `do` returns of each task, in any order; one that fails is tried again.

    `do` is called in up to `processes` other processes, to which it is sent with each task, or in this one if
    there is only one task or process.
    """
    if len(tasks) > 1 and processes > 1:
        yield from _each_in_processes(do, tasks, processes)
    else:
        yield from (_tried(do, task) for task in tasks)


def _run_in_turn(
    stage: Stage,
    context: Context,
    pending: Sequence[Task],
    progress: Progress,
    num_done: int,
    num_tasks: int,
) -> Iterator[Receipt]:
    for number, task in enumerate(pending, start=num_done + 1):
        shown: list[int] = []  # a task that shows its own steps leaves nothing to add

        def own(done: int, total: int, text: str = "", shown: list[int] = shown) -> None:
            shown.append(done)
            progress(done, total, text)

        yield _run_task(stage, context, task, own if num_tasks == 1 else _silent)
        if not shown:
            progress(number, num_tasks)


def counted(
    found: Iterator[Receipt | Failure], progress: Progress, num_done: int, num_tasks: int
) -> Iterator[Receipt | Failure]:
    """Pass on what tasks came to and show how many of all are done."""
    number = num_done
    for item in found:
        if isinstance(item, Receipt):
            number += 1
            progress(number, num_tasks)
        yield item


def _unless_of_machine(item: Receipt | Failure) -> Receipt | Failure:
    """Return what a task came to.

    Raises:
        InputError: for a failure of this machine, on which the other tasks are to run.
    """
    if isinstance(item, Failure) and item.is_of_machine:
        raise InputError(item.error)
    return item


def _tried(do: Callable[[Task], Found | Failure], task: Task) -> Found | Failure:
    """Do one task here, up to `TRIES` times."""
    found = do(task)
    while isinstance(found, Failure) and found.tries < TRIES:
        later = do(task)
        found = found.again(later) if isinstance(later, Failure) else later
    return found


def try_task(stage: Stage, context: Context, task: Task) -> Receipt | Failure:
    """Do one task here, once.

    Raises:
        ConfigError, Stopped: as the task raises them.
        OSError, InputError: what concerns the machine.
    """
    try:
        return _run_task(stage, context, task, _silent)
    except BaseException as error:  # a panic of a parser in Rust is no Exception
        if is_of_machine(error):
            raise
        return Failure.of(task, error)


def _run_task(stage: Stage, context: Context, task: Task, progress: Progress) -> Receipt:
    """Do one task and publish its receipt."""
    assert stage.run is not None
    started = time.monotonic()
    with durability.together():
        outcome = stage.run(stage.config, context, task, progress)
        return make_receipt(stage, context, task, outcome, time.monotonic() - started)


def _run_together(
    stage: Stage, context: Context, tasks: Sequence[Task], progress: Progress
) -> Iterator[Receipt | Failure]:
    assert stage.run_together is not None
    last = time.monotonic()
    for task, outcome in stage.run_together(stage.config, context, list(tasks), progress):
        now = time.monotonic()
        if isinstance(outcome, Outcome):
            yield make_receipt(stage, context, task, outcome, now - last)
        else:
            yield Failure.of(task, outcome)
        last = now


def run_group(stage: Stage, context: Context, tasks: Sequence[Task]) -> list[Receipt | Failure]:
    """Do some tasks on the machine that calls it; skips those that a machine now lost had finished.

    Every task has a receipt or a failure in the list. What ends a group as a whole is a failure of each task
    that is not done.
    """
    found: dict[str, Receipt | Failure] = {**receipts_that_count(stage, context, tasks, by_listing=False)}
    left = [task for task in tasks if task.name not in found]
    try:
        if stage.run_together is None:
            for task in left:
                found[task.name] = try_task(stage, context, task)
        elif left:
            for item in _run_together(stage, context, left, _silent):
                found[item.task] = item
    except BaseException as error:
        for task in left:
            if task.name not in found:
                found[task.name] = Failure.of(task, error)
    return list(found.values())


def do_group(do: Callable[[Task], Found | Failure], tasks: Sequence[Task]) -> list[Found | Failure]:
    """Return what `do` returns of some tasks, on the machine that calls it."""
    return [do(task) for task in tasks]


def _silent(done: int, total: int, text: str = "") -> None:
    """Show nothing: the progress of a task that runs next to others, where the stage's bar counts tasks."""


def _each_in_processes(
    do: Callable[[Task], Found | Failure], tasks: Sequence[Task], processes: int
) -> Iterator[Found | Failure]:
    failed: dict[str, Failure] = {}  # so far, of tasks that are tried again
    left = {task.name: task for task in tasks}
    suspects: list[Task] = []  # one of them killed its process: by itself in a pool, it shows which
    while left:
        alone = suspects.pop(0) if suspects else None
        batch = list(left.values()) if alone is None else [alone]
        unfinished = []
        for item in _each_in_pool(do, batch, processes, failed):
            if isinstance(item, Task):
                unfinished.append(item)
            else:
                del left[item.task]
                yield item
        if alone is None:
            # Calls begin in the order of their tasks, and one more than there are processes is handed over.
            suspects = unfinished[: min(processes, len(batch)) + 1]
        elif unfinished:
            found = _again(failed, Failure(alone.name, socket.gethostname(), _KILLED))
            if found.tries >= TRIES:
                del left[alone.name]
                yield found
            else:
                suspects.insert(0, alone)


def _each_in_pool(
    do: Callable[[Task], Found | Failure],
    tasks: Sequence[Task],
    processes: int,
    failed: dict[str, Failure],
) -> Iterator[Found | Failure | Task]:
    """Yield what tasks came to; a task itself if a process of the pool was killed before it was done."""
    # Spawned, not forked: polars and torch hold threads and locks that a fork would copy half-way.
    spawn = multiprocessing.get_context("spawn")
    waiting = collections.deque(tasks)
    begun: dict[concurrent.futures.Future[Found | Failure], Task] = {}
    is_broken = False
    with concurrent.futures.ProcessPoolExecutor(
        min(processes, len(tasks)), mp_context=spawn, initializer=begin_worker, initargs=(os.getpid(),)
    ) as pool:
        try:
            while begun or (waiting and not is_broken):
                while waiting and not is_broken and len(begun) < _HANDED_OVER * processes:
                    try:
                        with spawning(), sharing_cores(processes):
                            begun[pool.submit(do, waiting[0])] = waiting[0]
                    except concurrent.futures.process.BrokenProcessPool:
                        is_broken = True
                    else:
                        waiting.popleft()
                done, _ = concurrent.futures.wait(begun, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in [future for future in begun if future in done]:
                    task = begun.pop(future)
                    try:
                        found = future.result()
                    except concurrent.futures.process.BrokenProcessPool:
                        is_broken = True
                        yield task
                        continue
                    if isinstance(found, Failure) and (found := _again(failed, found)).tries < TRIES:
                        waiting.appendleft(task)
                    else:
                        yield found
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    yield from waiting


def _again(failed: dict[str, Failure], found: Failure) -> Failure:
    """Add a try of a task to those before it."""
    before = failed.get(found.task)
    failed[found.task] = found if before is None else before.again(found)
    return failed[found.task]
