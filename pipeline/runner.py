"""Runs and resumes a run's stages, and verifies their outputs."""

import contextlib
import functools
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NoReturn

from pipeline.core import drops, store
from pipeline.core.changes import write_started
from pipeline.core.failures import Failure, forget_failures, summary, too_many, write_failure
from pipeline.core.files.damage import find_damage, listed_files, summarise
from pipeline.core.files.folded_receipts import folding
from pipeline.core.progress import make_progress
from pipeline.core.records import ConfigError, InputError, Receipt, Stopped
from pipeline.core.run import (
    Run,
    StageStatus,
    State,
    locked,
    make_context,
    manifest_path,
    read_manifest,
    receipts_that_count,
    survey_stage,
)
from pipeline.core.stage import EARLIER, FIGURES, Context, Progress, Stage, Task, fold, make_receipt
from pipeline.core.stored_manifests import without_manifests
from pipeline.core.terminal import detail, inform, note, one_line
from pipeline.earlier import keep_earlier, move_earlier
from pipeline.executors import local
from pipeline.executors.checks import find_altered
from pipeline.executors.sources import hash_sources
from pipeline.planning.downloads import obtain_weights
from pipeline.planning.proportions import check_batches, notes_on_training
from pipeline.repair import forget_damaged, forget_unreadable, refuse_unusable_folder, restore_started


def execute(
    run: Run,
    stages: Sequence[Stage],
    *,
    redo: bool,
    force: bool = False,
    repair: bool = False,
    begin: Callable[[], None] | None = None,
    after: Callable[[Stage], None] | None = None,
) -> int:
    """Run the stages that are not up to date in order, and return the number of stages that had to run.

    A stale stage stops the run, unless `redo` is set or the person at the terminal agrees.
    `force` redoes finished stages too. `repair` hashes the outputs of finished tasks, redoes the tasks whose
    outputs are missing or differ, and folds damaged manifests anew. Without it a finished stage whose outputs
    are missing or have another size stops the run. `begin` is called before the first stage that runs, once
    nothing speaks against it; `after` after each stage that ran.
    """
    num_run = 0
    names = [stage.name for stage in run.stages]
    before_shards = set(names[: names.index("shards") + 1] if "shards" in names else names)
    is_judged = False
    with locked(run):
        store.sweep(run.folder, deep=False)
        obtain_weights(run, stages, force=force)
        for position, stage in enumerate(stages, start=1):
            refuse_unusable_folder(run, stage)
            if repair:
                forget_unreadable(run, stage)
            hash_sources(run, stage)
            status = survey_stage(run, stage)
            if status.num_tasks is None:
                raise ConfigError(
                    f"{stage.name} comes {status.why}, which is not done; run without --stage first"
                )
            if repair and forget_damaged(run, status):
                status = survey_stage(run, stage)
            if status.state is State.DAMAGED and not force:
                raise InputError(f"{status.why}; {run.remedy(stage.name)}")
            if status.why and status.state is not State.STALE:
                inform(f"{stage.name}: {status.state.value}, {status.why}")
            if status.state is State.DONE and not force:
                if repair:
                    restore_started(run, stage)
                continue
            if stage.name not in before_shards and not is_judged:
                is_judged = True
                _judge_training(run, stages[position - 1 :])
            with _naming_the_funnel(run, stage):
                is_as_surveyed = _make_way(run, status, redo=redo, force=force)
            _refuse_damaged_parents(run, stage)
            if begin is not None and num_run == 0:
                begin()
            with _naming_the_funnel(run, stage), _blaming_damaged_parents(run, stage):
                label = f"[{position}/{len(stages)}] {stage.name}"
                _run_stage(run, stage, label, status if is_as_surveyed else None)
            num_run += 1
            if after is not None:
                after(stage)
    return num_run


def _judge_training(run: Run, stages: Sequence[Stage]) -> None:
    """Print notes on training settings that do not suit the number of pairs, before training begins.

    Raises:
        ConfigError: if a stage cannot train.
    """
    for stage in stages:
        with _naming_the_funnel(run, stage):
            check_batches(run, [stage])
    for text in notes_on_training(run, stages):
        note(text)


def _make_way(run: Run, status: StageStatus, *, redo: bool, force: bool) -> bool:
    """Discard what is there of a stage that is done anew; returns whether everything stayed.

    Raises:
        ConfigError: if the stage is stale and the user did not agree to redo it, or if it could not run.
    """
    stage = status.stage
    if status.state is State.TO_DO and not (force and status.manifest is not None):
        if status.manifest is not None:
            store.remove(manifest_path(run, stage.name))  # it was done, and continues from a checkpoint
        return True
    if not (redo or _agrees(status)):
        raise ConfigError(
            f"{stage.name} is stale: {status.why}; run with --redo to redo it,"
            f" or change the settings back to keep it"
        )
    context = make_context(run, stage)
    if stage.check is not None and context is not None:
        stage.check(stage.config, context)
    _discard(run, stage, force=force)
    return False


def verify(run: Run, stages: Sequence[Stage]) -> list[str]:
    """Hash all outputs of the finished stages, and return a line for each that differs."""
    complaints = []
    for stage in stages:
        try:
            manifest = read_manifest(run, stage.name)
        except InputError as error:
            complaints.append(str(error))
            continue
        if manifest is None:
            continue
        remedy = run.remedy(stage.name)
        files = list(manifest.shards)
        try:
            files += listed_files(store.join(run.folder, stage.name))
        except ValueError as error:
            complaints.append(f"{error}; {remedy}")
        altered = {
            file.path: f"{store.join(run.folder, stage.name, file.path)}: {what}; {remedy}"
            for file, what in find_altered(run, stage.name, files, f"verify {stage.name}")
        }
        complaints += [altered[file.path] for file in files if file.path in altered]
    return complaints


def _refuse_damaged_parents(run: Run, stage: Stage) -> None:
    """Check the files that a stage may read.

    Raises:
        InputError: if one is missing or has another size.
    """
    for name in stage.parents:
        manifest = read_manifest(run, name)
        folder = store.join(run.folder, name)
        try:
            shards = manifest.shards if manifest is not None else ()
            damage = find_damage(folder, [*shards, *listed_files(folder)])
        except ValueError as error:
            damage = [str(error)]
        if damage:
            raise InputError(f"{summarise(damage)}; {stage.name} needs {name}; {run.remedy(name)}")


def unseen(run: Run, stages: Sequence[Stage]) -> list[str]:
    """Return the stages that are not finished, which `verify` ignores."""
    return [stage.name for stage in stages if not store.exists(manifest_path(run, stage.name))]


@contextlib.contextmanager
def _naming_the_funnel(run: Run, stage: Stage) -> Iterator[None]:
    """Add the stages that dropped rows to an error about too few rows."""
    try:
        yield
    except (InputError, ConfigError) as error:
        if error.rows_left is None:
            raise
        before = run.stages[: [item.name for item in run.stages].index(stage.name)]
        finished = [manifest for item in before if (manifest := read_manifest(run, item.name))]
        said = drops.funnel(finished, error.rows_left)
        raise type(error)(f"{error}; {said}" if said else str(error)) from None


@contextlib.contextmanager
def _blaming_damaged_parents(run: Run, stage: Stage) -> Iterator[None]:
    """Explain an error of unknown cause by altered bytes in a parent's files, if any differ.

    The errors of readers on altered bytes cannot be listed.
    """
    try:
        yield
    except (ConfigError, InputError, Stopped, OSError, MemoryError):
        raise
    except BaseException as error:
        # Rust parsers panic on unexpected bytes, and a panic is not an Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            _say(f"{stage.name}: unexpected {type(error).__name__}, so its inputs are being checked")
            if altered := _find_altered_parent(run, stage):
                raise InputError(altered) from None
        raise


def _find_altered_parent(run: Run, stage: Stage) -> str | None:
    """Return a line on the first altered file of the parents, or None.

    Files that cannot be checked explain nothing.
    """
    for name in stage.parents:
        folder = store.join(run.folder, name)
        with contextlib.suppress(InputError, ConfigError, OSError):
            manifest = read_manifest(run, name)
            shards = manifest.shards if manifest is not None else ()
            try:
                with contextlib.closing(find_altered(run, name, [*shards, *listed_files(folder)])) as found:
                    file = next(found, (None, ""))[0]
            except ValueError as error:
                damage = str(error)
            else:
                if file is None:
                    continue
                damage = f"{store.join(folder, file.path)}: not the bytes that were written"
            return f"{damage}; {stage.name} needs {name}; {run.remedy(name)}"
    return None


def _say(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


def _run_stage(run: Run, stage: Stage, label: str, status: StageStatus | None) -> None:
    """Do what is to do of a stage. `status` is what a survey has just found, if that is still so."""
    context = make_context(run, stage)
    assert context is not None  # execute() has checked
    if status is not None and status.tasks is not None and status.receipts is not None:
        tasks, receipts = list(status.tasks), dict(status.receipts)
    else:
        tasks = stage.plan(stage.config, context)
        receipts = receipts_that_count(stage, context, tasks)
    store.sweep(context.path())
    write_started(context, stage, tasks)
    forget_failures(context)
    pending = [task for task in tasks if task.name not in receipts]
    progress = make_progress(label)
    if pending:
        progress(len(receipts), len(tasks))
    num_done = len(receipts)
    failures: list[Failure] = []
    settled = _receipts(run, stage, context, pending, progress, num_done, len(tasks))
    with folding(context.path("receipts"), receipts) as fold_now, contextlib.closing(settled):
        for item in settled:
            fold_now.look()
            if isinstance(item, Receipt):
                receipts[item.task] = item
                continue
            failures.append(item)
            write_failure(context, item)
            if too_many(len(failures), len(receipts) - num_done):
                _refuse_failures(run, stage, context, failures, len(tasks))
        if failures:
            if len(failures) > run.max_failed_tasks or stage.set_aside is None:
                _refuse_failures(run, stage, context, failures, len(tasks))
            receipts |= _set_aside(stage, context, tasks, failures)
    store.sweep(context.path())  # a machine that was lost leaves behind what its tasks had begun
    manifest = fold(
        stage,
        tasks,
        {name: store.digest_bytes(parent.to_json().encode()) for name, parent in context.parents.items()},
        [receipts[task.name] for task in tasks],
    )
    if manifest.num_kept == 0 and not stage.may_be_empty:
        before = run.stages[: run.stages.index(stage)]
        finished = [found for item in before if (found := read_manifest(run, item.name))]
        raise InputError(f"{context.path()}: {drops.nothing_left(manifest, finished)}")
    if said := drops.warning(manifest):
        _say(f"warning: {said}")
    store.write_text(manifest_path(run, stage.name), manifest.to_file())
    store.remove(context.path(FIGURES))
    if stage.keeps is not None:
        store.remove(context.path(EARLIER))
    seconds = sum(receipt.seconds for receipt in receipts.values())
    detail(f"{stage.name}: {manifest.num_in:,} in, {manifest.num_kept:,} kept, {seconds:,.1f} s in its tasks")


def _refuse_failures(
    run: Run, stage: Stage, context: Context, failures: Sequence[Failure], num_tasks: int
) -> NoReturn:
    """End the stage for the tasks that failed.

    Raises:
        InputError: always, with an input of the stage that was altered, or else with the tasks.
    """
    if kinds := sorted({item.error.partition(":")[0] for item in failures if item.is_unexpected}):
        _say(f"{stage.name}: unexpected {', '.join(kinds)}, so its inputs are being checked")
        if altered := _find_altered_parent(run, stage):
            raise InputError(altered)
    can_go_on = stage.set_aside is not None
    instead = stage.without_task
    if not can_go_on and not instead and run.max_failed_tasks:
        instead = f"{stage.name} cannot continue without a task, as --without-failed and max_failed_tasks ask"
    raise InputError(summary(context, failures, num_tasks, can_go_on=can_go_on, instead=instead))


def _set_aside(
    stage: Stage, context: Context, tasks: Sequence[Task], failures: Sequence[Failure]
) -> dict[str, Receipt]:
    """Write receipts of the tasks that failed, which say that their rows are dropped.

    Raises:
        InputError: if the rows of one cannot be named.
    """
    assert stage.set_aside is not None
    by_name = {task.name: task for task in tasks}
    receipts = {}
    for failure in failures:
        task = by_name[failure.task]
        try:
            outcome = stage.set_aside(stage.config, context, task)
        except (InputError, OSError) as error:
            raise InputError(
                f"{failure.error}; task {task.name} of {stage.name} failed, and its rows cannot be dropped:"
                f" {error}"
            ) from None
        receipts[task.name] = make_receipt(stage, context, task, outcome, 0.0)
        _say(f"warning: {stage.name}: continuing without the {outcome.num_in:,} rows of task {task.name}")
    return receipts


def _receipts(
    run: Run,
    stage: Stage,
    context: Context,
    pending: list[Task],
    progress: Progress,
    num_done: int,
    num_tasks: int,
) -> Generator[Receipt | Failure, None, None]:
    if not pending:
        return
    if run.executor == "ray" and stage.parallel:
        from pipeline.executors.ray import map_tasks

        work = functools.partial(local.run_group, stage, without_manifests(context))
        together = stage.run_together is not None
        found = map_tasks(work, pending, run.processes, cores=stage.processes, together=together)
        yield from local.counted(found, progress, num_done, num_tasks)
        return
    yield from local.run_tasks(stage, context, pending, run.processes, progress, num_done, num_tasks)


def _discard(run: Run, stage: Stage, force: bool) -> None:
    """Reset a stale stage: keep the tasks whose receipts are still valid, and remove everything else."""
    context = make_context(run, stage)
    assert context is not None
    path = manifest_path(run, stage.name)
    tasks = [] if force else stage.plan(stage.config, context)
    counting = receipts_that_count(stage, context, tasks)
    is_kept = not force and keep_earlier(run, stage, context)
    if store.exists(path):
        store.remove(path)  # first: without it nothing here counts as complete
    if not counting and not is_kept:
        store.remove(context.path())
        return
    if is_kept:
        move_earlier(run, stage, context, counting)
    valid = {name + ending for name in counting for ending in (".json", ".files")}
    for name in store.list_files(context.path("receipts")):
        if name not in valid:
            store.remove(context.path("receipts", name))


def _agrees(status: StageStatus) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(
        one_line(f"{status.stage.name} is stale: {status.why}. Redo it? [y/N] "),
        end="",
        file=sys.stderr,
        flush=True,
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")
