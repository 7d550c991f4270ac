"""Run and resume a run's stages, and verify what they published."""

import contextlib
import sys
from collections.abc import Iterator, Sequence

from pipeline.core import drops, store
from pipeline.core.changes import write_started
from pipeline.core.progress import make_progress
from pipeline.core.records import ConfigError, InputError, Receipt, Shard, too_few
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
from pipeline.core.stage import Context, Progress, Stage, Task, fold, receipt_at
from pipeline.executors import local


def execute(
    run: Run, stages: Sequence[Stage], *, redo: bool, force: bool = False, repair: bool = False
) -> int:
    """Run the stages that are not up to date, in order; returns how many had to run.

    A stale stage stops the run, unless `redo` is set or the person at the terminal agrees.
    `force` redoes finished stages too. `repair` hashes the outputs of finished tasks, and redoes the tasks
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
            if repair and status.state is not State.STALE and _forget_damaged(run, stage):
                status = survey_stage(run, stage)
            if status.why and status.state is not State.STALE:
                print(f"{stage.name}: {status.state.value}, {status.why}", file=sys.stderr, flush=True)
            if status.state is State.DONE and not force:
                continue
            with _naming_the_funnel(run, stage):
                _make_way(run, status, redo=redo, force=force)
                _run_stage(run, stage, label=f"[{position}/{len(stages)}] {stage.name}")
            num_run += 1
    return num_run


def _make_way(run: Run, status: StageStatus, *, redo: bool, force: bool) -> None:
    """Discard what is there of a stage that is done anew.

    Raises:
        ConfigError: if the stage is stale and nobody agreed to redo it, or could not run so.
    """
    stage = status.stage
    if status.state is State.TO_DO and not (force and status.manifest is not None):
        if status.manifest is not None:
            store.remove(manifest_path(run, stage.name))  # it was done, and continues from a checkpoint
        return
    if not (redo or _agrees(status)):
        raise ConfigError(
            f"{stage.name} is stale: {status.why}; run with --redo to redo it,"
            f" or change the settings back to keep it"
        )
    context = make_context(run, stage)
    if stage.check is not None and context is not None:
        stage.check(stage.config, context)
    _discard(run, stage, force=force)


def verify(run: Run, stages: Sequence[Stage]) -> list[str]:
    """Hash every output of the finished stages again; returns a line for each that differs."""
    complaints = []
    for stage in stages:
        manifest = read_manifest(run, stage.name)
        if manifest is None:
            continue
        progress = make_progress(f"verify {stage.name}", "file")
        for number, shard in enumerate(manifest.shards, start=1):
            path = store.join(run.folder, stage.name, shard.path)
            if not store.exists(path):
                complaints.append(f"{path}: missing; run `--stage {stage.name} --repair`")
            elif store.digest_file(path) != shard.digest:
                complaints.append(
                    f"{path}: bytes differ from the manifest; run `--stage {stage.name} --repair`"
                )
            progress(number, len(manifest.shards))
    return complaints


def unseen(run: Run, stages: Sequence[Stage]) -> list[str]:
    """Return the stages that are not finished, of which `verify` says nothing."""
    return [stage.name for stage in stages if read_manifest(run, stage.name) is None]


def _forget_damaged(run: Run, stage: Stage) -> bool:
    """Make the tasks to do whose outputs differ from their receipts; True if there are any.

    Goes by receipts and manifest, because asking the stage for its tasks may hash its sources again.
    """
    folder = store.join(run.folder, stage.name)
    names = store.list_files(store.join(folder, "receipts"))
    progress = make_progress(f"repair {stage.name}", "task")
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


@contextlib.contextmanager
def _naming_the_funnel(run: Run, stage: Stage) -> Iterator[None]:
    """Add to an error of too few rows which stages dropped the others."""
    try:
        yield
    except (InputError, ConfigError) as error:
        if error.rows_left is None:
            raise
        before = run.stages[: [item.name for item in run.stages].index(stage.name)]
        finished = [manifest for item in before if (manifest := read_manifest(run, item.name))]
        said = drops.funnel(finished, error.rows_left)
        raise type(error)(f"{error}; {said}" if said else str(error)) from None


def _run_stage(run: Run, stage: Stage, label: str) -> None:
    context = make_context(run, stage)
    assert context is not None  # execute() has checked
    tasks = stage.plan(stage.config, context)
    store.sweep(context.path())
    write_started(context, stage, tasks)
    receipts = receipts_that_count(stage, context, tasks)
    pending = [task for task in tasks if task.name not in receipts]
    progress = make_progress(label)
    for receipt in _receipts(run, stage, context, pending, progress, len(receipts), len(tasks)):
        receipts[receipt.task] = receipt
    store.sweep(context.path())  # a machine that was lost leaves behind what its tasks had begun
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
        found = (
            f"{context.path()}: no rows left of {manifest.num_in:,} after {stage.name}"
            f" ({removed or 'its input was empty'}); loosen [{stage.name}] or check the source"
        )
        raise too_few(InputError(found), manifest.num_in)
    if said := drops.warning(manifest):
        print(f"warning: {said}", file=sys.stderr, flush=True)
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
    if not pending:
        return
    if run.executor == "ray" and stage.parallel:
        from pipeline.executors.ray import map_tasks

        found = map_tasks(local.run_group, stage, context, pending, run.processes)
        yield from local.counted(found, progress, num_done, num_tasks)
        return
    yield from local.run_tasks(stage, context, pending, run.processes, progress, num_done, num_tasks)


def _discard(run: Run, stage: Stage, force: bool) -> None:
    """Make a stale stage to do: keep the tasks whose receipts still count, remove everything else."""
    context = make_context(run, stage)
    assert context is not None
    path = manifest_path(run, stage.name)
    if store.exists(path):
        store.remove(path)  # first: without it nothing here counts as complete
    tasks = [] if force else stage.plan(stage.config, context)
    valid = {f"{name}.json" for name in receipts_that_count(stage, context, tasks)}
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
        f"{status.stage.name} is stale: {status.why}. Redo it? [y/N] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")
