"""A resolved run and the state of its stages: done, stale, damaged or to do."""

import contextlib
import enum
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.core import store
from pipeline.core.changes import Started, Verdict, judge, read_started
from pipeline.core.failures import failed_tasks
from pipeline.core.files.damage import ListedSizes, find_damage, summarise
from pipeline.core.files.folded_receipts import read_receipts_in
from pipeline.core.files.lock import exclusive
from pipeline.core.records import ConfigError, InputError, Manifest, Receipt
from pipeline.core.stage import (
    Context,
    Stage,
    Task,
    is_of_task,
    receipt_path,
    receipts_at,
    repair_remedy,
)

_FEW_TASKS = 8  # whose files are asked for one by one: a listing names all files of a stage


class State(enum.Enum):
    DONE = "done"
    DAMAGED = "damaged"  # done, but outputs are missing or have another size
    STALE = "stale"
    TO_DO = "to do"


@dataclass(frozen=True, slots=True)
class StageStatus:
    """The state of one stage."""

    stage: Stage
    state: State
    why: str  # what changed, or what a stage to do waits for; empty if neither
    tasks_done: int
    num_tasks: int | None  # None while the parents are not done
    manifest: Manifest | None  # also of a stage that was done and continues: its state is to do
    # Of a stage that is to do: its tasks, and the receipts of those that are done. None: not looked for.
    tasks: Sequence[Task] | None = None
    receipts: Mapping[str, Receipt] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A resolved run: its folder and its stages in order."""

    folder: str
    seed: int
    executor: Literal["local", "ray"]
    processes: int
    stages: tuple[Stage, ...]
    max_failed_tasks: int = 0
    name: str = "RUN.toml"  # what the user called it: a file, a shipped recipe or the run's folder

    def stage(self, name: str) -> Stage:
        """Return the stage of that name.

        Raises:
            ConfigError: if the run has no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(
            f"{name}: no such stage in this run; it has {', '.join(s.name for s in self.stages)}"
        )

    def remedy(self, stage: str) -> str:
        """Return the remedy in errors about damaged outputs of a stage."""
        own = next((item.repair for item in self.stages if item.name == stage), "")
        return own or repair_remedy(stage, self.name)


def manifest_path(run: Run, stage: str) -> str:
    """Return the path of a stage's manifest, which exists once the stage is finished."""
    return store.join(run.folder, stage, "manifest.json")


def read_manifest(run: Run, stage: str) -> Manifest | None:
    """Return a finished stage's manifest, or None if the stage is not finished."""
    path = manifest_path(run, stage)
    if not store.exists(path):
        return None
    try:
        return Manifest.from_json(store.read_bytes(path))
    except (ValueError, IsADirectoryError):
        raise InputError(
            f"{path}: damaged manifest, which receipts can replace; {run.remedy(stage)}"
        ) from None


def make_context(run: Run, stage: Stage) -> Context | None:
    """Return the stage's context, or None while a parent is not finished."""
    parents = {name: read_manifest(run, name) for name in stage.parents}
    finished = {name: manifest for name, manifest in parents.items() if manifest is not None}
    if len(finished) < len(parents):
        return None
    return Context(run.folder, stage.name, run.seed, finished)


def receipts_that_count(
    stage: Stage, context: Context, tasks: Sequence[Task], *, by_listing: bool | None = None
) -> dict[str, Receipt]:
    """Return the receipts of the tasks that are done with this configuration and these inputs, by task.

    `by_listing` says whether the stage's files are listed, or only those of these tasks asked for; None: as
    suits most of a stage's tasks.
    """
    if by_listing is None:
        by_listing = len(tasks) > _FEW_TASKS
    if by_listing:
        read = read_receipts_in(context.path("receipts"), {f"{task.name}.json" for task in tasks})
        receipts = [read.get(f"{task.name}.json") for task in tasks]
    else:
        receipts = receipts_at([receipt_path(context, task) for task in tasks])
    found = [
        (task.name, receipt)
        for task, receipt in zip(tasks, receipts, strict=True)
        if receipt is not None and is_of_task(receipt, stage, task)
    ]
    if by_listing:
        size_of: Callable[[str], int | None] = ListedSizes(context.path()).of
    else:
        size_of = functools.partial(_size_of, context)
    return {
        name: receipt
        for name, receipt in found
        if all(size_of(output.path) == output.num_bytes for output in receipt.outputs)
    }


def _size_of(context: Context, path: str) -> int | None:
    try:
        return store.num_bytes(context.path(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_receipts(run: Run, stage: str) -> tuple[list[Receipt], int]:
    """Return the receipts of a stage, in order of task names, and the number of those that are damaged."""
    found = read_receipts_in(store.join(run.folder, stage, "receipts"))
    receipts = [receipt for receipt in found.values() if receipt is not None]
    return receipts, len(found) - len(receipts)


def survey_stage(run: Run, stage: Stage) -> StageStatus:
    """Return the state of a stage, judged only by digests; this reads no data."""
    manifest = read_manifest(run, stage.name)
    context = make_context(run, stage)
    if context is None:
        waiting = [name for name in stage.parents if read_manifest(run, name) is None]
        return StageStatus(stage, State.TO_DO, f"after {waiting[-1]}", 0, None, manifest)
    tasks = stage.plan(stage.config, context)
    started = read_started(context)
    if manifest is not None:
        made = Started(manifest.config_digest, manifest.inputs_digest)
        if started and (made.config_digest, made.inputs_digest) == (
            started.config_digest,
            started.inputs_digest,
        ):
            made = started  # it names the settings behind the digests
        verdict = judge(stage, context, tasks, made, is_done=True)
        if verdict.stale:
            return StageStatus(stage, State.STALE, verdict.stale, 0, len(tasks), manifest)
        if verdict.goes_on:
            return StageStatus(stage, State.TO_DO, verdict.goes_on, 0, len(tasks), manifest)
        if damage := find_damage(context.path(), manifest.shards):
            return StageStatus(stage, State.DAMAGED, summarise(damage), len(tasks), len(tasks), manifest)
        why = f"with {', '.join(verdict.kept)}: the same work" if verdict.kept else ""
        return StageStatus(stage, State.DONE, why, len(tasks), len(tasks), manifest)
    verdict = judge(stage, context, tasks, started, is_done=False) if started else Verdict()
    receipts = receipts_that_count(stage, context, tasks)
    done = len(receipts)
    if verdict.stale:
        return StageStatus(stage, State.STALE, verdict.stale, done, len(tasks), None)
    notes = [f"continues with {', '.join(verdict.kept)}"] if verdict.kept else []
    if failed := failed_tasks(context):
        count = "1 task" if len(failed) == 1 else f"{len(failed):,} tasks"
        notes.append(f"{count} failed when it was last run, see {context.path('failed')}")
    return StageStatus(stage, State.TO_DO, "; ".join(notes), done, len(tasks), None, tasks, receipts)


def survey(run: Run) -> list[StageStatus]:
    """Return the state of every stage, in order."""
    return [survey_stage(run, stage) for stage in run.stages]


def survey_what_is_there(run: Run) -> tuple[list[StageStatus], list[str]]:
    """Survey the stages; print a line for each missing or unusable input, and report its stages as to do."""
    statuses, complaints = [], dict[str, None]()
    for stage in run.stages:
        try:
            statuses.append(survey_stage(run, stage))
        except InputError as error:
            complaints[str(error)] = None  # one file may stop many stages
            statuses.append(StageStatus(stage, State.TO_DO, "an input is missing, see below", 0, None, None))
    return _naming_what_follows(statuses), list(complaints)


def _naming_what_follows(statuses: list[StageStatus]) -> list[StageStatus]:
    """Say of each finished stage behind a stale one that other output of that one makes it stale, too."""
    named, behind = [], dict[str, str]()  # stage → the stale stage before it
    for status in statuses:
        stage = status.stage
        stale = next((behind[parent] for parent in stage.parents if parent in behind), None)
        if status.state is State.STALE:
            behind[stage.name] = stale or stage.name
        elif status.state is State.DONE and stale is not None:
            behind[stage.name] = stale
            status = replace(status, why=f"again if the output of {stale} changes")
        named.append(status)
    return named


def select(run: Run, only: str | None, first: str | None, last: str | None) -> list[Stage]:
    """Return the stages that `--stage`, `--from` and `--to` name.

    Raises:
        ConfigError: for an unknown name.
    """
    names = [stage.name for stage in run.stages]
    if only is not None:
        return [run.stage(only)]
    start = names.index(run.stage(first).name) if first else 0
    end = names.index(run.stage(last).name) + 1 if last else len(names)
    if start >= end:
        raise ConfigError(f"--from {first} comes after --to {last}; the order is {', '.join(names)}")
    return list(run.stages[start:end])


@contextlib.contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold the lock of a run's folder, which admits one command at a time (local folders only)."""
    with exclusive(run.folder):
        yield
