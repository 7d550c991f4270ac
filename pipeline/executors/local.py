"""Run tasks on this machine: one after the other, together, or in several processes."""

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence

from pipeline.core.files import durability
from pipeline.core.processes import die_with_parent, spawning
from pipeline.core.records import InputError, Receipt
from pipeline.core.run import receipts_that_count
from pipeline.core.stage import Context, Progress, Stage, Task, make_receipt


def run_tasks(
    stage: Stage,
    context: Context,
    pending: Sequence[Task],
    processes: int,
    progress: Progress,
    num_done: int,
    num_tasks: int,
) -> Iterator[Receipt]:
    """Run the pending tasks of a stage with `num_tasks` tasks, of which `num_done` are done.

    Progress is the task's own if it is the only one, else the number of tasks done.
    """
    if stage.run_together is not None:
        yield from _run_together(stage, context, pending, progress)
        return
    if stage.parallel and len(pending) > 1 and processes > 1:
        yield from counted(
            _run_in_processes(stage, context, pending, processes), progress, num_done, num_tasks
        )
        return
    for number, task in enumerate(pending, start=num_done + 1):
        shown: list[int] = []  # a task that shows its own steps leaves nothing to add

        def own(done: int, total: int, text: str = "", shown: list[int] = shown) -> None:
            shown.append(done)
            progress(done, total, text)

        yield _run_task(stage, context, task, own if num_tasks == 1 else _silent)
        if not shown:
            progress(number, num_tasks)


def counted(
    receipts: Iterator[Receipt], progress: Progress, num_done: int, num_tasks: int
) -> Iterator[Receipt]:
    """Pass receipts on and show how many of all tasks are done."""
    for number, receipt in enumerate(receipts, start=num_done + 1):
        progress(number, num_tasks)
        yield receipt


def _run_task(stage: Stage, context: Context, task: Task, progress: Progress) -> Receipt:
    """Do one task and publish its receipt."""
    assert stage.run is not None
    started = time.monotonic()
    with durability.together():
        outcome = stage.run(stage.config, context, task, progress)
        return make_receipt(stage, context, task, outcome, time.monotonic() - started)


def _run_together(
    stage: Stage, context: Context, tasks: Sequence[Task], progress: Progress
) -> Iterator[Receipt]:
    assert stage.run_together is not None
    last = time.monotonic()
    for task, outcome in stage.run_together(stage.config, context, list(tasks), progress):
        now = time.monotonic()
        yield make_receipt(stage, context, task, outcome, now - last)
        last = now


def run_group(stage: Stage, context: Context, tasks: Sequence[Task]) -> list[Receipt]:
    """Do some tasks on the machine that calls it; skips those that a machine now lost had finished."""
    done = receipts_that_count(stage, context, tasks)
    left = [task for task in tasks if task.name not in done]
    if stage.run_together is None:
        receipts = [_run_task(stage, context, task, _silent) for task in left]
    else:
        receipts = list(_run_together(stage, context, left, _silent)) if left else []
    return [*done.values(), *receipts]


def _silent(done: int, total: int, text: str = "") -> None:
    """Show nothing: the progress of a task that runs next to others, where the stage's bar counts tasks."""


def _run_in_processes(
    stage: Stage, context: Context, tasks: Sequence[Task], processes: int
) -> Iterator[Receipt]:
    # Spawned, not forked: polars and torch hold threads and locks that a fork would copy half-way.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        min(processes, len(tasks)), mp_context=spawn, initializer=die_with_parent, initargs=(os.getpid(),)
    ) as pool:
        with spawning():
            futures = [pool.submit(_run_task, stage, context, task, _silent) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(
                f"{context.path()}: a worker process was killed, most often because memory ran out;"
                f" rerun with a smaller [run] processes"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
