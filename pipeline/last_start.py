"""The settings with which a run was last started: `run.resolved.toml` in its folder.

docs/concepts/runs.md, "Settings of a run", says which commands read them and which read the run's file.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.catalog import RunConfig, load, make_run, resolve
from pipeline.core import store
from pipeline.core.config import apply_overrides, read_toml, to_toml
from pipeline.core.leaves import differing
from pipeline.core.records import ConfigError, InputError
from pipeline.core.run import Run, select
from pipeline.core.stage import Stage
from pipeline.core.terminal import inform, note, one_line
from pipeline.runner import execute
from training.stages import TrainStageConfig, check_given_files

RESOLVED = "run.resolved.toml"
_MOST_SAID = 6  # settings in a note


def resolved_path(folder: str) -> str:
    """Return the path of the settings with which the run in a folder was last started."""
    return store.join(folder, RESOLVED)


def write_started(run: Run, config: RunConfig) -> None:
    """Write all settings, including defaults and `--set`, when the work begins."""
    store.write_text(resolved_path(run.folder), to_toml(config))


def load_as_started(target: str, overrides: Sequence[str] = ()) -> tuple[Run, RunConfig]:
    """Load a run with the settings of its last start, for a command that inspects its results.

    `target` is the run's file, a shipped recipe, or the run's folder. A note lists differences from the file.
    With `overrides`, or before the first start, the settings come from the file.

    Raises:
        ConfigError: if there is no such file, or if it is no run's.
    """
    if is_folder(target):
        return _load_folder(target, overrides)
    run, config = load(target, overrides)
    if overrides or (started := _read_started(run.folder)) is None:
        return run, config
    _say_differences(run.folder, config, started, target)
    return make_run(started), started


def start(
    target: str,
    overrides: Sequence[str] = (),
    *,
    only: str | None = None,
    first: str | None = None,
    last: str | None = None,
    redo: bool = False,
    repair: bool = False,
    without_failed: bool = False,
) -> tuple[Run, int, int]:
    """Run the stages that are not up to date, for the command line and for Python alike.

    `without_failed` lets any number of tasks fail, as `[run] max_failed_tasks` lets some.

    Returns the run, how many stages had to run, and how many were asked for.

    Raises:
        ConfigError, InputError: one line that names the file and the key and says what to do.
    """
    run, config = load_to_start(target, overrides)
    if without_failed:
        run = dataclasses.replace(run, max_failed_tasks=sys.maxsize)
    stages = select(run, only, first, last)
    for stage in stages:  # a corpus takes days, so report what training lacks before it starts
        if isinstance(stage.config, TrainStageConfig):
            check_given_files(stage.config, stage.name)
    begin = functools.partial(write_started, run, config)
    num_run = execute(
        run,
        stages,
        redo=redo,
        force=redo and only is not None,
        repair=repair,
        begin=begin,
        after=functools.partial(_show_corpus, run, stages),
    )
    return run, num_run, len(stages)


def _show_corpus(run: Run, stages: Sequence[Stage], done: Stage) -> None:
    """Write the page of a corpus once it is packed, unless its own report is the next thing that is made.

    The report of the whole run replaces it.
    """
    path, whole = store.join(run.folder, "report.html"), store.join(run.folder, "report", "report.html")
    if done.name == "report" and store.exists(path):
        store.write_text(path, store.read_text(whole))
    later = stages[stages.index(done) + 1 :]
    is_next = (
        later
        and later[-1].name == "report"
        and not any(isinstance(stage.config, TrainStageConfig) for stage in later)
    )
    if done.name != "shards" or is_next:
        return
    from eval.report.run_page import write_run_page

    try:
        write_run_page(run, path)
    except (
        ConfigError,
        InputError,
        OSError,
    ) as error:  # training may take weeks, and a page is written again at any time
        note(f"the report of the corpus is not written: {one_line(str(error))}")
    else:
        inform(f"report of the corpus: {path}")


def load_to_start(target: str, overrides: Sequence[str] = ()) -> tuple[Run, RunConfig]:
    """Load a run with the settings of its file and `overrides`, for a command that starts or plans it.

    A note lists differences from the last start. If `target` is a run's folder, the settings are those of the
    last start.

    Raises:
        ConfigError: if there is no such file, or if it is no run's.
    """
    run, config = _load_folder(target, overrides) if is_folder(target) else load(target, overrides)
    if (started := _read_started(run.folder)) is not None:
        _say_differences(run.folder, config, started, "now")
    return run, config


def say_differences(target: str) -> None:
    """Print a note if the run of a file was last started with different settings.

    A file that cannot start a run has nothing to compare; its model may still exist.
    """
    try:
        _, config = load(target)
    except ConfigError:
        return
    if (started := _read_started(config.run.folder)) is not None:
        _say_differences(config.run.folder, config, started, target)


def is_folder(target: str) -> bool:
    """Return whether a target is a run's folder, which it is if it has resolved settings."""
    return not target.endswith(".toml") and store.exists(resolved_path(target))


def _load_folder(folder: str, overrides: Sequence[str]) -> tuple[Run, RunConfig]:
    path = resolved_path(folder)
    _, config = resolve(apply_overrides(read_toml(path), overrides), path)
    config = _in_folder(config, folder.rstrip("/"))
    return make_run(config), config


def _read_started(folder: str) -> RunConfig | None:
    """Return the settings of a run's last start; None if it has not started or they cannot be read."""
    path = resolved_path(folder)
    if not store.exists(path):
        return None
    try:
        _, config = resolve(read_toml(path), path)
    except (ConfigError, InputError) as error:
        note(f"{error}; the settings are those of the run's file")
        return None
    return _in_folder(config, folder)


def _in_folder(config: RunConfig, folder: str) -> RunConfig:
    """Return the configuration with its current folder, because a run may have been moved."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, folder=folder))


def _say_differences(folder: str, config: RunConfig, started: RunConfig, name: str) -> None:
    before, now = dict(_leaves(dataclasses.asdict(started))), dict(_leaves(dataclasses.asdict(config)))
    found = [
        difference
        for key in {**before, **now}
        if key != "run.folder"
        for difference in differing(key, before.get(key), now.get(key))
    ]
    if not found:
        return
    said = [f"{key} = {_shown(old)} ({name}: {_shown(new)})" for key, old, new in found[:_MOST_SAID]]
    more = f" and {len(found) - _MOST_SAID} more" if len(found) > _MOST_SAID else ""
    note(f"{folder} was started with {', '.join(said)}{more}")


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is set, except tables; a list is one value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}{key}.")
    elif value is not None:
        yield prefix.removesuffix("."), value


def _shown(value: Any, limit: int = 60) -> str:
    text = "unset" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"
