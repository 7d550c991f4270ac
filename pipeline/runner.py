"""Plan, run and resume: what is done, what is stale, what is left, and doing just that."""

import concurrent.futures
import contextlib
import enum
import fcntl
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.core import store
from pipeline.core.processes import die_with_parent
from pipeline.core.progress import make_progress
from pipeline.core.records import ConfigError, InputError, Manifest, Receipt, Shard
from pipeline.core.stage import (
    Context,
    Progress,
    Stage,
    Task,
    fold,
    inputs_digest,
    make_receipt,
    read_receipt,
    receipt_at,
    receipt_counts,
)


class State(enum.Enum):
    DONE = "done"
    STALE = "stale"
    TO_DO = "to do"


@dataclass(frozen=True, slots=True)
class StageStatus:
    """Where one stage stands."""

    stage: Stage
    state: State
    why: str  # for stale: what changed; for to do: what it waits for; else empty
    tasks_done: int
    num_tasks: int | None  # None while the parents are not done
    manifest: Manifest | None


@dataclass(frozen=True, slots=True)
class Run:
    """A resolved run: its folder and its stages in order."""

    folder: str
    seed: int
    executor: Literal["local", "ray"]
    processes: int
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(
            f"{name}: no such stage in this run; it has {', '.join(s.name for s in self.stages)}"
        )


def manifest_path(run: Run, stage: str) -> str:
    return store.join(run.folder, stage, "manifest.json")


def read_manifest(run: Run, stage: str) -> Manifest | None:
    """A finished stage's manifest, or None where the stage is not finished."""
    path = manifest_path(run, stage)
    if not store.exists(path):
        return None
    try:
        return Manifest.from_json(store.read_text(path))
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: damaged manifest; remove the file and run again") from None


def make_context(run: Run, stage: Stage) -> Context | None:
    """The stage's context, or None while a parent is not finished."""
    parents = {name: read_manifest(run, name) for name in stage.parents}
    finished = {name: manifest for name, manifest in parents.items() if manifest is not None}
    if len(finished) < len(parents):
        return None
    return Context(run.folder, stage.name, run.seed, finished)


def survey_stage(run: Run, stage: Stage) -> StageStatus:
    """Where a stage stands, judged by digests alone; reads no data."""
    manifest = read_manifest(run, stage.name)
    context = make_context(run, stage)
    if context is None:
        waiting = [name for name in stage.parents if read_manifest(run, name) is None]
        return StageStatus(stage, State.TO_DO, f"after {waiting[-1]}", 0, None, manifest)
    tasks = stage.plan(stage.config, context)
    if manifest is not None:
        why = _changed(stage, tasks, manifest.config_digest, manifest.inputs_digest)
        state = State.STALE if why else State.DONE
        return StageStatus(stage, state, why, len(tasks) if not why else 0, len(tasks), manifest)
    started = _read_started(context)
    why = _changed(stage, tasks, *started) if started else ""
    done = sum(
        1
        for task in tasks
        if (receipt := read_receipt(context, task)) and receipt_counts(stage, context, task, receipt)
    )
    return StageStatus(stage, State.STALE if why else State.TO_DO, why, done, len(tasks), None)


def survey(run: Run) -> list[StageStatus]:
    return [survey_stage(run, stage) for stage in run.stages]


def survey_what_is_there(run: Run) -> tuple[list[StageStatus], list[str]]:
    """Like `survey`, and a line for each input that is not there yet, or is no good: its stages are to do."""
    statuses, complaints = [], dict[str, None]()
    for stage in run.stages:
        try:
            statuses.append(survey_stage(run, stage))
        except InputError as error:
            complaints[str(error)] = None  # one file may stop many stages
            statuses.append(StageStatus(stage, State.TO_DO, "an input is missing, see below", 0, None, None))
    return statuses, list(complaints)


def select(run: Run, only: str | None, first: str | None, last: str | None) -> list[Stage]:
    """The stages that `--stage`, `--from` and `--to` name; ConfigError for an unknown name."""
    names = [stage.name for stage in run.stages]
    if only is not None:
        return [run.stage(only)]
    start = names.index(run.stage(first).name) if first else 0
    end = names.index(run.stage(last).name) + 1 if last else len(names)
    if start >= end:
        raise ConfigError(f"--from {first} comes after --to {last}; the order is {', '.join(names)}")
    return list(run.stages[start:end])


def execute(run: Run, stages: Sequence[Stage], *, redo: bool, force: bool = False, mend: bool = False) -> int:
    """Do what is missing, in order; returns how many stages had to run.

    A stale stage stops the run, unless `redo` is set or the person at the terminal agrees.
    `force` redoes finished stages too. `mend` hashes the outputs of what is done again, and redoes the tasks
    whose outputs are missing or differ.
    """
    num_run = 0
    with locked(run):
        for position, stage in enumerate(stages, start=1):
            status = survey_stage(run, stage)
            if status.num_tasks is None:
                raise ConfigError(
                    f"{stage.name} comes {status.why}, which is not done; run without --stage first"
                )
            if mend and status.state is not State.STALE and _forget_damaged(run, stage):
                status = survey_stage(run, stage)
            if status.state is State.DONE and not force:
                continue
            if status.state is State.STALE or (status.state is State.DONE and force):
                if not (redo or _agrees(status)):
                    raise ConfigError(
                        f"{stage.name} is stale: {status.why}; run with --redo to do it again,"
                        f" or change the settings back to keep it"
                    )
                _discard(run, stage, force=force)
            _run_stage(run, stage, label=f"[{position}/{len(stages)}] {stage.name}")
            num_run += 1
    return num_run


def verify(run: Run, stages: Sequence[Stage]) -> list[str]:
    """Hash every output of the finished stages again; returns one line for each that differs."""
    complaints = []
    for stage in stages:
        manifest = read_manifest(run, stage.name)
        if manifest is None:
            continue
        progress = make_progress(f"verify {stage.name}", "file")
        for number, shard in enumerate(manifest.shards, start=1):
            path = store.join(run.folder, stage.name, shard.path)
            if not store.exists(path):
                complaints.append(f"{path}: missing; run `--stage {stage.name} --mend`")
            elif store.digest_file(path) != shard.digest:
                complaints.append(
                    f"{path}: bytes differ from the manifest; run `--stage {stage.name} --mend`"
                )
            progress(number, len(manifest.shards))
    return complaints


def _forget_damaged(run: Run, stage: Stage) -> bool:
    """Make the tasks to do whose outputs have not the bytes of their receipts; True where there are any.

    Goes by receipts and manifest: asking the stage for its tasks may hash its sources again.
    """
    folder = store.join(run.folder, stage.name)
    names = store.list_files(store.join(folder, "receipts"))
    progress = make_progress(f"mend {stage.name}", "task")
    damaged, whole = [], set[str]()
    for number, name in enumerate(names, start=1):
        receipt = receipt_at(store.join(folder, "receipts", name))
        outputs = receipt.outputs if receipt is not None else ()
        if receipt is not None and all(_is_whole(store.join(folder, out.path), out) for out in outputs):
            whole |= {output.path for output in outputs}
        else:
            damaged.append(name)
        progress(number, len(names))
    manifest = read_manifest(run, stage.name)
    is_short = manifest is not None and any(shard.path not in whole for shard in manifest.shards)
    if is_short or (manifest is not None and damaged):
        store.remove(manifest_path(run, stage.name))  # first: without it nothing here counts as complete
        print(f"{stage.name}: {len(damaged)} of {len(names)} tasks are damaged", file=sys.stderr, flush=True)
    for name in damaged:
        store.remove(store.join(folder, "receipts", name))
    return is_short or bool(damaged)


def _is_whole(path: str, output: Shard) -> bool:
    return (
        store.exists(path)
        and store.num_bytes(path) == output.num_bytes
        and store.digest_file(path) == output.digest
    )


def _run_stage(run: Run, stage: Stage, label: str) -> None:
    context = make_context(run, stage)
    assert context is not None  # execute() has checked
    tasks = stage.plan(stage.config, context)
    store.sweep(context.path())
    _write_started(context, stage, tasks)
    receipts: dict[str, Receipt] = {}
    for task in tasks:
        receipt = read_receipt(context, task)
        if receipt is not None and receipt_counts(stage, context, task, receipt):
            receipts[task.name] = receipt
    pending = [task for task in tasks if task.name not in receipts]
    progress = make_progress(label)
    for receipt in _receipts(run, stage, context, pending, progress, len(receipts), len(tasks)):
        receipts[receipt.task] = receipt
    store.sweep(context.path())  # a machine that was lost took its tasks with it, not what they had begun
    manifest = fold(
        stage,
        tasks,
        {name: store.digest_bytes(parent.to_json().encode()) for name, parent in context.parents.items()},
        [receipts[task.name] for task in tasks],
    )
    if manifest.num_kept == 0 and not stage.may_be_empty:
        removed = ", ".join(
            f"{reason} removed {count:,}"
            for reason, count in sorted(manifest.dropped.items(), key=lambda item: -item[1])
        )
        raise InputError(
            f"{context.path()}: no rows left of {manifest.num_in:,} after {stage.name}"
            f" ({removed or 'its input was empty'}); loosen [{stage.name}] or check the source"
        )
    store.write_text(manifest_path(run, stage.name), manifest.to_json())


def _receipts(
    run: Run,
    stage: Stage,
    context: Context,
    pending: list[Task],
    progress: Progress,
    num_done: int,
    num_tasks: int,
) -> Iterator[Receipt]:
    """Run the pending tasks; show tasks done of all tasks, or the task's own progress where there is one."""
    if not pending:
        return
    if run.executor == "ray" and stage.parallel:
        from pipeline.executors.ray import map_tasks

        found = map_tasks(run_group, stage, context, pending, run.processes)
        yield from _counted(found, progress, num_done, num_tasks)
        return
    if stage.run_together is not None:
        yield from _run_together(stage, context, pending, progress)
        return
    if stage.parallel and len(pending) > 1 and run.processes > 1:
        yield from _counted(_run_in_processes(run, stage, context, pending), progress, num_done, num_tasks)
        return
    for number, task in enumerate(pending, start=num_done + 1):
        shown: list[int] = []  # a task that shows its own steps leaves nothing to add

        def own(done: int, total: int, text: str = "", shown: list[int] = shown) -> None:
            shown.append(done)
            progress(done, total, text)

        yield run_task(stage, context, task, own if num_tasks == 1 else _silent)
        if not shown:
            progress(number, num_tasks)


def _counted(
    receipts: Iterator[Receipt], progress: Progress, num_done: int, num_tasks: int
) -> Iterator[Receipt]:
    """Show tasks done of all tasks, receipt by receipt."""
    for number, receipt in enumerate(receipts, start=num_done + 1):
        progress(number, num_tasks)
        yield receipt


def run_task(stage: Stage, context: Context, task: Task, progress: Progress) -> Receipt:
    """Do one task and publish its receipt."""
    assert stage.run is not None
    started = time.monotonic()
    outcome = stage.run(stage.config, context, task, progress)
    return make_receipt(stage, context, task, outcome, time.monotonic() - started)


def _run_together(stage: Stage, context: Context, tasks: list[Task], progress: Progress) -> Iterator[Receipt]:
    assert stage.run_together is not None
    last = time.monotonic()
    for task, outcome in stage.run_together(stage.config, context, tasks, progress):
        now = time.monotonic()
        yield make_receipt(stage, context, task, outcome, now - last)
        last = now


def run_group(stage: Stage, context: Context, tasks: Sequence[Task]) -> list[Receipt]:
    """Do some tasks on whatever machine this is; what a machine now lost had finished stays as it is."""
    done = {
        task.name: receipt
        for task in tasks
        if (receipt := read_receipt(context, task)) and receipt_counts(stage, context, task, receipt)
    }
    left = [task for task in tasks if task.name not in done]
    if stage.run_together is None:
        receipts = [run_task(stage, context, task, _silent) for task in left]
    else:
        receipts = list(_run_together(stage, context, left, _silent)) if left else []
    return [*done.values(), *receipts]


def _silent(done: int, total: int, text: str = "") -> None:
    """The progress of a task that runs beside others: the stage's bar counts tasks."""


def _run_in_processes(run: Run, stage: Stage, context: Context, tasks: list[Task]) -> Iterator[Receipt]:
    # Spawned, not forked: polars and torch hold threads and locks that a fork would copy half-way.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        min(run.processes, len(tasks)), mp_context=spawn, initializer=die_with_parent
    ) as pool:
        futures = [pool.submit(run_task, stage, context, task, _silent) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(
                f"{context.path()}: a worker process was killed, most often for want of memory;"
                f" run again with a smaller [run] processes"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _changed(stage: Stage, tasks: list[Task], config_digest: str, digest_of_inputs: str) -> str:
    changes = []
    if config_digest != stage.config_digest:
        changes.append("its configuration changed")
    if digest_of_inputs != inputs_digest(tasks):
        changes.append("its inputs changed")
    return " and ".join(changes)


def _started_path(context: Context) -> str:
    return context.path("started.json")


def _read_started(context: Context) -> tuple[str, str] | None:
    if not store.exists(_started_path(context)):
        return None
    fields = json.loads(store.read_text(_started_path(context)))
    return fields["config_digest"], fields["inputs_digest"]


def _write_started(context: Context, stage: Stage, tasks: list[Task]) -> None:
    # Binds half-done work (checkpoints, half a download) to what it was made from.
    fields = {"config_digest": stage.config_digest, "inputs_digest": inputs_digest(tasks)}
    store.write_text(_started_path(context), json.dumps(fields))


def _discard(run: Run, stage: Stage, force: bool) -> None:
    """Make a stale stage to do: keep the tasks whose receipts still count, remove everything else."""
    context = make_context(run, stage)
    assert context is not None
    path = manifest_path(run, stage.name)
    if store.exists(path):
        store.remove(path)  # first: without it nothing here counts as complete
    tasks = [] if force else stage.plan(stage.config, context)
    valid = {
        f"{task.name}.json"
        for task in tasks
        if (receipt := read_receipt(context, task)) and receipt_counts(stage, context, task, receipt)
    }
    if not valid:
        store.remove(context.path())
        return
    for name in store.list_files(context.path("receipts")):
        if name not in valid:
            store.remove(context.path("receipts", name))


def _agrees(status: StageStatus) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(
        f"{status.stage.name} is stale: {status.why}. Do it again? [y/N] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextlib.contextmanager
def locked(run: Run) -> Iterator[None]:
    """One `cnclip run` at a time in a folder (local folders only)."""
    if not store.is_local(run.folder):
        yield
        return
    os.makedirs(run.folder, exist_ok=True)
    with open(os.path.join(run.folder, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{run.folder}: another `cnclip run` is at work here; wait for it or stop it"
            ) from None
        yield
