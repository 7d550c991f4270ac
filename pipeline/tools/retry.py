"""`cnclip retry`: retry failed downloads that may be transient and carry the results to the shards."""

import concurrent.futures
import dataclasses
import functools
import itertools
from dataclasses import dataclass

from data_prep.download import retry
from data_prep.download import stage as download
from data_prep.download.retry import Failures
from pipeline.core import store
from pipeline.core.failures import PARTITION_FAILED
from pipeline.core.files.folded_receipts import fold_receipts, read_receipts_in
from pipeline.core.records import ConfigError, InputError, Manifest, Receipt
from pipeline.core.run import (
    Run,
    State,
    locked,
    make_context,
    manifest_path,
    read_manifest,
    read_receipts,
    survey_stage,
)
from pipeline.core.stage import Context, Stage, Task, fold, receipt_path, repair_remedy
from pipeline.executors.anywhere import map_anywhere
from pipeline.runner import execute

_PACKED = ("shards", "validation", "lock")  # the last stages of a recovered row
_FEW = 8  # partitions that are merged here: other processes take as long to start
_AT_ONCE = 64  # files written or removed
_NO_OUTAGE = 2.0  # most of these rows may fail again without an outage


@dataclass(frozen=True, slots=True)
class Retried:
    """The result of a pass."""

    number: int
    asked: int
    recovered: int
    redone: tuple[str, ...]  # stages after the download that processed the recovered rows


def plan(run: Run) -> list[Failures]:
    """Return the failures of the download by class.

    Raises:
        ConfigError: if the download is not done.
    """
    return retry.failures(_context(run, _pass_stage(run, _finished(run))))


def do(run: Run) -> Retried:
    """Retry the rows worth it, merge the results, and redo the finished stages up to the shards.

    After a kill the same call resumes: the pass from its receipts, a merge from the start. Other stages see
    the old download until the merge replaces its manifest as the last step.
    """
    stage = _pass_stage(run, _finished(run))
    if not retry.plan(stage.config, _context(run, stage)):
        return Retried(0, 0, 0, _bring_up_to_date(run))
    execute(dataclasses.replace(run, stages=(*run.stages, stage)), [stage], redo=True)
    with locked(run):
        done = _merge(run, stage)
    return dataclasses.replace(done, redone=_bring_up_to_date(run))


def _finished(run: Run) -> Manifest:
    status = survey_stage(run, run.stage("download"))
    if status.state is not State.DONE or status.manifest is None:
        why = f" ({status.why})" if status.why else ""
        raise ConfigError(f"{run.folder}: download is {status.state.value}{why}; run it first: --to download")
    return status.manifest


def _pass_stage(run: Run, done: Manifest) -> Stage:
    before = run.stage("download")
    return dataclasses.replace(
        before,
        name=f"download/retry{retry.next_pass(done)}",
        title="retries rows whose failure may be transient",
        config=dataclasses.replace(before.config, outage_share=_NO_OUTAGE),
        parents=("corpus", "dedup", "download"),
        plan=retry.plan,
        run_together=download.run_together,
        may_be_empty=True,
    )


def _context(run: Run, stage: Stage) -> Context:
    context = make_context(run, stage)
    assert context is not None  # the download is done, so its parents are
    return context


def _merge(run: Run, stage: Stage) -> Retried:
    """Replace the receipts of the retried partitions, then the manifest, then clean up."""
    target = run.stage("download")
    context, of_pass = _context(run, target), _context(run, stage)
    number = retry.next_pass(of_pass.parents["download"])
    tasks = target.plan(target.config, context)
    came = {item.task: item for item in _receipts(of_pass, stage.plan(stage.config, of_pass))}
    before = _receipts(context, tasks)
    pairs = [
        Task(item.task, {}, {"before": item, "came": came[item.task]})
        for item in before
        if item.task in came and not retry.is_merged(item, number)
    ]
    merge = functools.partial(_merge_one, dataclasses.replace(of_pass, parents={}), number)
    done = map(merge, pairs) if len(pairs) <= _FEW else map_anywhere(run, merge, pairs)
    by_task = {receipt.task: receipt for receipt in done}
    merged = [by_task.get(item.task, item) for item in before]
    parents = {name: store.digest_bytes(item.to_json().encode()) for name, item in context.parents.items()}
    manifest = fold(target, tasks, parents, merged)
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(functools.partial(_write, context), by_task.values()))
        fold_receipts(context.path("receipts"), {receipt.task: receipt for receipt in merged})
        store.write_text(manifest_path(run, "download"), manifest.to_file())
        list(pool.map(store.remove, list(retry.unused_files(of_pass, manifest))))
    asked, recovered = (
        sum(item.num_in for item in came.values()),
        sum(item.num_kept for item in came.values()),
    )
    return Retried(number, asked, recovered, ())


def _merge_one(context: Context, number: int, task: Task) -> Receipt:
    return retry.merge(context, number, task.arguments["before"], task.arguments["came"])


def _write(context: Context, receipt: Receipt) -> None:
    store.write_text(context.path("receipts", f"{receipt.task}.json"), receipt.to_file())


def _receipts(context: Context, tasks: list[Task]) -> list[Receipt]:
    read = read_receipts_in(context.path("receipts"))
    found = []
    for task in tasks:
        receipt = read.get(f"{task.name}.json")
        if receipt is None:
            raise InputError(
                f"{receipt_path(context, task)}: missing or damaged; {repair_remedy(context.stage)}"
            )
        found.append(receipt)
    return found


def _forget_set_aside(run: Run, stage: Stage) -> None:
    """Make the tasks to do that the run continued without, and with them the stage."""
    manifest = read_manifest(run, stage.name)
    if manifest is not None and PARTITION_FAILED in manifest.dropped:
        with locked(run):
            store.remove(manifest_path(run, stage.name))
            for receipt in read_receipts(run, stage.name)[0]:
                if PARTITION_FAILED in receipt.dropped:
                    store.remove(_context(run, stage).path("receipts", f"{receipt.task}.json"))


def _bring_up_to_date(run: Run) -> tuple[str, ...]:
    """Redo the previously finished stages from the download up to the shards."""
    names = [stage.name for stage in run.stages]
    last = max(names.index(name) for name in _PACKED if name in names)
    after = run.stages[names.index("download") + 1 : last + 1]
    had = list(itertools.takewhile(lambda stage: read_manifest(run, stage.name) is not None, after))
    for stage in had:
        _forget_set_aside(run, stage)
    changed = [stage for stage in had if survey_stage(run, stage).state is not State.DONE]
    if not changed:
        return ()
    first = had.index(changed[0])
    execute(run, had[first:], redo=True)
    return tuple(stage.name for stage in had[first:])
