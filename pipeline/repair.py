"""`run --repair`: discards what is damaged, so that the run redoes it and keeps everything else."""

import os
import sys
from collections.abc import Mapping

from pipeline.core import store
from pipeline.core.changes import Started, read_started, started_path, write_started
from pipeline.core.config import digest
from pipeline.core.files.damage import listing_path, parse_listing, read_listings
from pipeline.core.records import SCHEMA_VERSION, ConfigError, InputError, Manifest, Receipt, Shard
from pipeline.core.run import (
    Run,
    StageStatus,
    State,
    make_context,
    manifest_path,
    read_manifest,
    receipts_that_count,
)
from pipeline.core.stage import Context, Stage, receipts_at
from pipeline.core.terminal import one_line
from pipeline.executors.checks import find_altered


def refuse_unusable_folder(run: Run, stage: Stage) -> None:
    """Refuse a stage's folder that cannot hold files, before anything in it changes.

    Raises:
        ConfigError: if it is a broken link or a file.
    """
    path = store.join(run.folder, stage.name)
    if not store.is_local(path) or os.path.isdir(path) or not os.path.lexists(path):
        return
    if os.path.islink(path):
        raise ConfigError(
            f"{path}: a broken link to {os.readlink(path)}; mount or make that folder, or remove the link"
        )
    raise ConfigError(f"{path}: a file in the place of the stage's folder; move it away")


def forget_unreadable(run: Run, stage: Stage) -> None:
    """Remove a stage's manifest and `started.json` if they cannot be read."""
    path = manifest_path(run, stage.name)
    context = Context(run.folder, stage.name, run.seed, {})
    if read_started(context) is None:
        store.remove(started_path(context))
    try:
        read_manifest(run, stage.name)
    except InputError:
        store.remove(path)
        _say(f"{stage.name}: its manifest is damaged and is rebuilt from the receipts")


def restore_started(run: Run, stage: Stage) -> None:
    """Rewrite `started.json` of a finished stage if it was damaged or belongs to other work."""
    context, manifest = make_context(run, stage), read_manifest(run, stage.name)
    assert context is not None  # the stage is done
    assert manifest is not None
    tasks, made = stage.plan(stage.config, context), (manifest.config_digest, manifest.inputs_digest)
    started, now = read_started(context), Started.of(stage, context, tasks)
    is_its_own = started is not None and (started.config_digest, started.inputs_digest) == made
    if not is_its_own and (now.config_digest, now.inputs_digest) == made:
        write_started(context, stage, tasks)


def forget_damaged(run: Run, status: StageStatus) -> bool:
    """Discard tasks whose outputs differ from their receipts; return whether the stage has changed.

    A manifest that contradicts the receipts is also removed, as is a stale one whose tasks are all valid; the
    run rebuilds it.
    """
    stage, manifest = status.stage, status.manifest
    folder = store.join(run.folder, stage.name)
    if status.state is State.STALE:
        return _forget_stale_manifest(run, stage)
    names = _receipt_names(folder)
    paths = [store.join(folder, "receipts", name) for name in names]
    listings = read_listings(store.join(folder, "receipts"))
    receipts: dict[str, Receipt] = {}  # those that are right as far as they go, by path
    files: dict[str, list[Shard]] = {}  # what they vouch for
    for path, receipt in zip(paths, receipts_at(paths), strict=True):
        if receipt is not None and _agrees(receipt, stage, manifest):
            also = _also(receipt, listings.get(os.path.basename(listing_path(path))))
            if also is not None:
                files[path], receipts[path] = [*receipt.outputs, *also], receipt
    every = [file for of_task in files.values() for file in of_task]
    altered = {file.path for file, _ in find_altered(run, stage.name, every, f"repair {stage.name}")}
    whole = {
        receipt.task: receipt
        for path, receipt in receipts.items()
        if altered.isdisjoint(file.path for file in files[path])
    }
    damaged = [path for path in paths if path not in receipts or receipts[path].task not in whole]
    if manifest is not None and (damaged or not _is_folded_from(manifest, stage, whole)):
        store.remove(manifest_path(run, stage.name))  # first: without it nothing is complete
        what = f"{len(damaged)} of {len(names)} tasks are damaged" if damaged else "its manifest is damaged"
        _say(f"{stage.name}: {what}")
    elif not damaged:
        return False
    for path in damaged:
        store.remove(path)
        store.remove(listing_path(path))
    return True


def _forget_stale_manifest(run: Run, stage: Stage) -> bool:
    """Remove the marks of a stale stage if all its tasks are valid for the current settings and inputs."""
    context = make_context(run, stage)
    assert context is not None  # it has a state
    tasks = stage.plan(stage.config, context)
    names = {f"{task.name}.json" for task in tasks}
    if len(receipts_that_count(stage, context, tasks)) < len(tasks) or names != set(
        _receipt_names(store.join(run.folder, stage.name))
    ):
        return False  # it really is stale
    store.remove(manifest_path(run, stage.name))
    store.remove(started_path(context))
    _say(f"{stage.name}: its manifest is damaged, but all its receipts are valid")
    return True


def _receipt_names(folder: str) -> list[str]:
    """Return the names of all entries in the folder of receipts; a folder there is a damaged receipt."""
    place = store.join(folder, "receipts")
    names = store.list_files(place)
    if store.is_local(place) and os.path.isdir(place):
        names += [entry.name for entry in os.scandir(place) if not entry.is_file()]
    return sorted(name for name in names if name.endswith(".json") and not name.startswith("."))


def _also(receipt: Receipt, listing: bytes | None) -> list[Shard] | None:
    """Return the further files of a task; None if their listing is missing or damaged."""
    if receipt.also and (listing is None or store.digest_bytes(listing) != receipt.also):
        return None
    try:
        return [] if listing is None else parse_listing(listing)
    except ValueError:
        return None


def _agrees(receipt: Receipt, stage: Stage, manifest: Manifest | None) -> bool:
    """Return whether the stage's manifest agrees with a receipt; if not, the task runs again."""
    if manifest is None:
        return True
    shards = {shard.path: shard for shard in manifest.shards}
    return (
        receipt.stage == stage.name
        and digest(receipt.extra) == digest(manifest.extra.get(receipt.task, {}))  # NaN equals itself there
        and all(
            shards[output.path].num_samples == output.num_samples
            for output in receipt.outputs
            if output.path in shards
        )
    )


def _is_folded_from(manifest: Manifest, stage: Stage, receipts: Mapping[str, Receipt]) -> bool:
    dropped: dict[str, int] = {}
    for receipt in receipts.values():
        for reason, count in receipt.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return (
        manifest.stage == stage.name
        and manifest.schema_version == SCHEMA_VERSION
        and set(manifest.shards) == {output for receipt in receipts.values() for output in receipt.outputs}
        and manifest.num_in == sum(receipt.num_in for receipt in receipts.values())
        and manifest.num_kept == sum(receipt.num_kept for receipt in receipts.values())
        and manifest.dropped == dropped
        and manifest.extra.keys() == {task for task, receipt in receipts.items() if receipt.extra}
    )


def _say(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)
