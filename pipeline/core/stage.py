"""Defines stages, their tasks and outcomes, and the receipts that record finished tasks.

A stage turns its parents' manifests into tasks; a task reads named inputs, writes files in the stage's folder
and accounts for every row. The runner (`pipeline.runner`) decides what has to run and publishes receipts and
manifests, which a stage never reads.
"""

import concurrent.futures
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pipeline.core import store
from pipeline.core.config import Binds, digest
from pipeline.core.files import durability
from pipeline.core.files.damage import listing_path, make_listing
from pipeline.core.leaves import differing
from pipeline.core.records import SCHEMA_VERSION, InputError, Manifest, Receipt, Shard

EARLIER = "earlier"  # folder in a stage's with what an earlier build has published, while a redo uses it
UNFINISHED = "unfinished.json"  # manifest there of a build that was not finished, of the tasks that were done
FIGURES = "figures"  # folder in a stage's with what its calls have done so far, until the stage is done
_FEW = 8  # receipts that are read one after the other
_READERS = 64  # receipts read at once: a store answers each after some 20 ms


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of a stage's work; tasks are independent and may run anywhere in any order."""

    name: str  # file name of its receipt; names sort in the order of the outputs
    inputs: Mapping[str, str]  # label → digest of what it reads
    # Plain values in addition to the stage's configuration.
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a task did.

    Rows in = rows kept + rows dropped by reason.
    """

    outputs: Mapping[str, int]  # path relative to the stage's folder → samples in it
    num_in: int
    num_kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)  # small deterministic facts for later stages
    # Output → its sha256, hex, where it is known from writing it; the others are read back.
    digests: Mapping[str, str] = field(default_factory=dict)
    # Further files for later stages, too many for a receipt; a listing next to it has sizes and digests.
    also: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that had another value when a stage's work began."""

    key: str  # dotted, within the stage's configuration
    before: Any
    now: Any
    binds: Binds

    def __str__(self) -> str:
        name = self.key.rpartition(".")[2]
        said = [
            f"{key} {_short(before)} → {_short(now)}"
            for key, before, now in differing(name, self.before, self.now)
        ]
        more = f" and {len(said) - _MOST_SAID} more" if len(said) > _MOST_SAID else ""
        return ", ".join(said[:_MOST_SAID]) + more


_MOST_SAID = 4  # differences inside one setting


def _short(value: Any, limit: int = 40) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class Progress(Protocol):
    """Called by long tasks with counts in the stage's units (shards, steps)."""

    def __call__(self, done: int, total: int, text: str = "") -> None: ...


class Show(Protocol):
    """Starts a Progress from a label and a unit's name, like `pipeline.core.progress.make_progress`."""

    def __call__(self, label: str, unit: str) -> Progress: ...


def show_nothing(label: str, unit: str) -> Progress:
    """Return a Progress that shows nothing."""

    def silent(done: int, total: int, text: str = "") -> None:
        pass

    return silent


@dataclass(frozen=True, slots=True)
class Context:
    """The run as a task sees it: folders, seed and the parents' manifests."""

    run_folder: str
    stage: str
    seed: int
    parents: Mapping[str, Manifest]

    def path(self, *parts: str) -> str:
        """Return a path under this stage's folder."""
        return store.join(self.run_folder, self.stage, *parts)

    def path_in(self, stage: str, *parts: str) -> str:
        """Return a path under another stage's folder."""
        return store.join(self.run_folder, stage, *parts)

    def shards_of(self, stage: str, suffix: str = "") -> list[Shard]:
        """Return a parent's outputs that end with `suffix`, with full paths."""
        return [
            Shard(self.path_in(stage, shard.path), shard.num_samples, shard.num_bytes, shard.digest)
            for shard in self.parents[stage].shards
            if shard.path.endswith(suffix)
        ]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run.

    All callables are module-level functions, so that a stage can be sent to other processes.

    `run` does one task. If tasks must run together (one img2dataset call for all outstanding shards)
    `run_together` is given instead and yields (task, outcome) pairs as they finish; the error of a task that
    failed takes the place of its outcome.
    `version` changes when the same configuration would give other bytes than before.
    """

    name: str
    title: str  # one line for users
    version: int
    config: Any
    parents: tuple[str, ...]
    plan: Callable[[Any, Context], list[Task]]
    run: Callable[[Any, Context, Task, Progress], Outcome] | None = None
    run_together: (
        Callable[[Any, Context, list[Task], Progress], Iterable[tuple[Task, Outcome | InputError]]] | None
    ) = None
    parallel: bool = True  # tasks may run in several processes at once
    processes: int = 1  # that one call starts: what it needs of a cluster's cores
    may_be_empty: bool = False  # that no row is left is no error
    # The outcome of a task that a run continues without: its rows dropped as `partition_failed`. None: what
    # other tasks make depends on it.
    set_aside: Callable[[Any, Context, Task], Outcome] | None = None
    without_task: str = ""  # if `set_aside` is None: what to do about a task that nothing repairs
    # (configuration, settings of earlier work) → whether a redo can use what that has published. The runner
    # moves it to EARLIER of the stage's folder, and removes it when the stage is done.
    keeps: Callable[[Any, Mapping[str, Any]], bool] | None = None
    # Raises what its run would refuse at once: before a redo discards what is there.
    check: Callable[[Any, Context], None] | None = None
    is_seeded: bool = False  # its work depends on the run's seed, which is not in the configuration
    # (configuration, seed) with which older work without recorded settings began; None if unknown.
    begun_with: Callable[[Any, Context], tuple[Any, int] | None] | None = None
    unbound_inputs: frozenset[str] = frozenset()  # labels of inputs like BINDS_NEVER
    # (configuration, context, a change that BINDS_EXACTLY, whether the stage is done) → (whether its work
    # continues exactly under it, a sentence on how it does or why it does not).
    continues: Callable[[Any, Context, Change, bool], tuple[bool, str]] | None = None

    repair: str = ""  # remedy for damaged outputs; empty: `repair_remedy`, as in any run with a file
    # configuration → weights from outside the run by label: paths, or names that are looked up beforehand
    weights: Callable[[Any], Mapping[str, str]] | None = None
    # configuration → files from outside the run whose `digests_of_files` `plan` takes
    sources: Callable[[Any], Sequence[str]] | None = None

    @property
    def config_digest(self) -> str:
        return digest(self.name, self.version, self.config)


RUN_FILE = "RUN.toml"  # stands for the run's file in remedies; a command puts the file in that it was given


def repair_remedy(stage: str) -> str:
    """Return the remedy in errors about damaged outputs of a run's stage."""
    return f"repair it: cnclip run {RUN_FILE} --stage {stage} --repair"


def task_digest(task: Task) -> str:
    """Return the digest of a task's inputs and arguments."""
    return digest(dict(task.inputs), dict(task.arguments))


def receipt_path(context: Context, task: Task) -> str:
    return context.path("receipts", f"{task.name}.json")


def make_receipt(stage: Stage, context: Context, task: Task, outcome: Outcome, seconds: float) -> Receipt:
    """Sync and digest a task's outputs and write its receipt, as the last step of a task."""
    if store.is_local(context.run_folder):
        files = [str(Path(context.path(path))) for path in (*outcome.outputs, *outcome.also)]
        durability.sync_outputs(files, str(Path(context.run_folder)))
    listing = make_listing(context.path(), outcome.also)
    outputs = tuple(
        Shard(path, num_samples, store.num_bytes(full), outcome.digests.get(path) or store.digest_file(full))
        for path, num_samples in outcome.outputs.items()
        for full in [context.path(path)]
    )
    receipt = Receipt(
        stage=stage.name,
        task=task.name,
        inputs_digest=task_digest(task),
        config_digest=stage.config_digest,
        outputs=outputs,
        num_in=outcome.num_in,
        num_kept=outcome.num_kept,
        dropped=dict(sorted(outcome.dropped.items())),
        seconds=round(seconds, 3),
        extra=outcome.extra,
        also=store.digest_bytes(listing.encode("utf-8")) if outcome.also else "",
    )
    if outcome.also:
        store.write_text(listing_path(receipt_path(context, task)), listing)
    else:
        store.remove(listing_path(receipt_path(context, task)))
    store.write_text(receipt_path(context, task), receipt.to_file())
    return receipt


def receipt_at(path: str) -> Receipt | None:
    """Return the receipt in a file; None if there is none, it is not readable or it is another task's."""
    try:
        receipt = Receipt.from_json(store.read_bytes(path))
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return receipt if path.endswith(f"/{receipt.task}.json") else None


def receipts_at(paths: Sequence[str]) -> list[Receipt | None]:
    """Return what `receipt_at` returns of each path; many are read at once."""
    if len(paths) <= _FEW:
        return [receipt_at(path) for path in paths]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(receipt_at, paths))


def is_of_task(receipt: Receipt, stage: Stage, task: Task) -> bool:
    """Return whether a receipt is of these inputs and this configuration."""
    return receipt.inputs_digest == task_digest(task) and receipt.config_digest == stage.config_digest


def inputs_digest(tasks: list[Task], *, without: frozenset[str] = frozenset()) -> str:
    """Return the digest of a whole stage's inputs, except those with labels in `without`."""
    if without:
        tasks = [
            replace(task, inputs={label: sha for label, sha in task.inputs.items() if label not in without})
            for task in tasks
        ]
    return digest([[task.name, task_digest(task)] for task in tasks])


def fold(
    stage: Stage, tasks: list[Task], parent_digests: Mapping[str, str], receipts: list[Receipt]
) -> Manifest:
    """Combine a finished stage's receipts into its manifest, in task order, without times."""
    dropped: dict[str, int] = {}
    for receipt in receipts:
        for reason, count in receipt.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return Manifest(
        stage=stage.name,
        schema_version=SCHEMA_VERSION,
        config_digest=stage.config_digest,
        inputs_digest=inputs_digest(tasks),
        parents=dict(sorted(parent_digests.items())),
        shards=tuple(output for receipt in receipts for output in receipt.outputs),
        num_in=sum(receipt.num_in for receipt in receipts),
        num_kept=sum(receipt.num_kept for receipt in receipts),
        dropped=dict(sorted(dropped.items())),
        extra={receipt.task: receipt.extra for receipt in receipts if receipt.extra},
    )
