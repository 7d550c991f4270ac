"""A redo that uses what an earlier build has published: it is moved to `earlier/` of the stage's folder."""

import concurrent.futures
from collections.abc import Collection

from pipeline.core import store
from pipeline.core.changes import Started, read_started, started_path
from pipeline.core.files.damage import ListedSizes
from pipeline.core.run import Run, read_manifest, read_receipts
from pipeline.core.stage import EARLIER, UNFINISHED, Context, Stage, fold

_MOVED_AT_ONCE = 64


def keep_earlier(run: Run, stage: Stage, context: Context) -> bool:
    """Note in `earlier/` what a stale stage has published, if a redo can use it; returns whether it can.

    Called before anything of the earlier build is removed.
    """
    started = read_started(context)
    if stage.keeps is None or started is None or started.settings is None:
        return False
    if not stage.keeps(stage.config, started.settings["config"]):
        return False
    manifest = read_manifest(run, stage.name)
    name = "manifest.json"
    if manifest is None:
        manifest = fold(stage, [], {}, read_receipts(run, stage.name)[0])
        name = UNFINISHED
    if manifest.shards:
        _note_settings(context, started)
        store.write_text(context.path(EARLIER, name), manifest.to_file())
    return True


def _note_settings(context: Context, started: Started) -> None:
    """Keep what the earlier build was begun with; nothing, if builds of other settings lie there already."""
    before = Context(context.path(), EARLIER, 0, {})
    if store.exists(started_path(before)):
        found = read_started(before)
        if found is None or found.config_digest != started.config_digest:
            store.remove(started_path(before))
    elif not store.list_files(before.path()):
        store.write_bytes(started_path(before), store.read_bytes(started_path(context)))


def move_earlier(run: Run, stage: Stage, context: Context, counting: Collection[str]) -> None:
    """Move the outputs of the tasks of which no receipt is in `counting`; those that are moved stay there."""
    receipts, _ = read_receipts(run, stage.name)
    stay = {output.path for receipt in receipts if receipt.task in counting for output in receipt.outputs}
    moving = {output.path for receipt in receipts for output in receipt.outputs} - stay
    sizes = ListedSizes(context.path())

    def move(path: str) -> None:
        store.move(context.path(path), context.path(EARLIER, path))

    with concurrent.futures.ThreadPoolExecutor(_MOVED_AT_ONCE) as pool:
        list(pool.map(move, sorted(path for path in moving if sizes.of(path) is not None)))
