"""`cnclip report`: the page of a run in its current state, finished or not, with name, date and times.

The stage `report` writes a page that depends only on the run's data, so that equal runs have equal bytes.
This page is in no digest: it lies next to the stages' folders, and each call rewrites it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from eval.report.collect import collect
from eval.report.data import Live, ReportData, StageState
from eval.report.page import render_html
from eval.stages import ReportConfig
from pipeline.core import store
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import InputError, Manifest
from pipeline.core.run import (
    Run,
    StageStatus,
    make_context,
    read_manifest,
    read_receipts,
    receipts_that_count,
    survey_what_is_there,
)
from pipeline.core.stage import Context, fold

_TAIL_BYTES = 1 << 16  # of a log, enough for its last line


def run_name(run: Run) -> str:
    """Return a run's name: that of its folder."""
    return run.folder.rstrip("/").rpartition("/")[2] or run.folder


def write_run_page(run: Run, path: str, *, refresh_seconds: int | None = None) -> bool:
    """Write the page of a run; return whether every stage is done.

    Raises:
        InputError: if the run has not begun, or a file of a finished stage is missing or damaged.
    """
    data = read_run(run, refresh_seconds=refresh_seconds)
    assert data.live is not None
    is_done = data.live.num_done == len(data.live.states)
    if is_done and data.live.refresh_seconds is not None:
        data = dataclasses.replace(data, live=dataclasses.replace(data.live, refresh_seconds=None))
    store.write_text(path, render_html(data))
    return is_done


def read_run(run: Run, *, refresh_seconds: int | None = None, with_images: bool = True) -> ReportData:
    """Return the data of a run so far; without images only its numbers.

    Raises:
        InputError: if the run has not begun, or a file of a finished stage is missing or damaged.
    """
    if not store.exists(store.join(run.folder, "corpus", "started.json")):
        raise InputError(
            f"{run.folder}: this run has not begun; start it with `cnclip run`, or check [run] folder"
        )
    statuses, _ = survey_what_is_there(run)
    statuses = [status for status in statuses if status.stage.name != "report"]
    manifests, finished = {}, set[str]()
    for status in statuses:
        name = status.stage.name
        if (manifest := read_manifest(run, name)) is not None:
            manifests[name] = manifest
            finished.add(name)
        elif (partial := _so_far(run, status)) is not None:
            manifests[name] = partial
    config = run.stage("report").config
    assert isinstance(config, ReportConfig)
    data = collect(
        config,
        Context(run.folder, "report", run.seed, manifests),
        finished,
        with_images=with_images,
        lenient=True,
    )
    began, ended = _times(run, config)
    live = Live(
        name=run_name(run),
        date=_shown(began, "%Y-%m-%d"),
        written=_shown(time.time(), "%Y-%m-%d %H:%M"),
        states={status.stage.name: _state(run, status) for status in statuses},
        refresh_seconds=refresh_seconds,
    )
    times = {"began": _shown(began), "ended": _shown(ended)} if ended is not None else {}
    facts = {"name": live.name, **data.facts, "folder": run.folder, **times}
    return dataclasses.replace(data, live=live, facts=facts)


def _so_far(run: Run, status: StageStatus) -> Manifest | None:
    """Return the sums over the receipts of an unfinished stage; None if it has no valid receipt."""
    stage = status.stage
    if not status.tasks_done or (context := make_context(run, stage)) is None:
        return None
    receipts = status.receipts
    if receipts is None:
        receipts = receipts_that_count(stage, context, stage.plan(stage.config, context))
    return fold(stage, [], {}, list(receipts.values())) if receipts else None


def _state(run: Run, status: StageStatus) -> StageState:
    receipts, _ = read_receipts(run, status.stage.name)
    seconds = sum(receipt.seconds for receipt in receipts)
    return StageState(status.state.value, status.tasks_done, status.num_tasks, seconds)


def _times(run: Run, config: ReportConfig) -> tuple[float | None, float | None]:
    """Return when training began and when it logged its last step, from the logs of the training stages.

    Without a log, the beginning is the modification time of the corpus stage's file, which a copy of the
    folder may not preserve.
    """
    logged = [
        found
        for stage in config.training_stages
        for path in [store.join(run.folder, stage, "log.jsonl")]
        if store.exists(path)
        for found in _first_and_last(path)
    ]
    if logged:
        return min(logged), max(logged)
    if not store.is_local(run.folder):
        return None, None
    return Path(run.folder, "corpus", "started.json").stat().st_mtime, None


def _first_and_last(path: str) -> Iterator[float]:
    """Yield the times of a log's first line and of its last readable line."""
    with store.open_read(path) as file:
        lines = [file.readline()]
        file.seek(max(0, store.num_bytes(path) - _TAIL_BYTES))
        lines += file.read(_TAIL_BYTES).splitlines()[::-1]
    found = []
    for line in lines:
        with contextlib.suppress(
            ValueError, KeyError, TypeError
        ):  # a truncated line, or one still being written
            found.append(float(parse_json(line)["time"]))
        if len(found) == 2:
            break
    yield from found


def _shown(seconds: float | None, form: str = "%Y-%m-%d %H:%M UTC") -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime(form)


def settings_of(run: Run) -> Mapping[str, object]:
    """Return the settings of a run's stages: `stage.field` → value."""
    found: dict[str, object] = {"seed": run.seed}
    for stage in run.stages:
        # `lock` repeats the settings of the stages before it.
        if stage.name not in ("lock", "report") and dataclasses.is_dataclass(stage.config):
            found |= dict(_leaves(dataclasses.asdict(stage.config), stage.name))  # type: ignore[arg-type]
    return found


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}")
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{name}.{number}")
    else:
        yield name, value
